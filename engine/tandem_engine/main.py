"""`tandem-worker`: one worker, from its flags to its exit code."""

import os
import socket
import sys

from tandem_engine.config import WorkerConfig, parse_args
from tandem_engine.core.process import CoreChild
from tandem_engine.errors import ConfigError
from tandem_engine.fabric.environment import choose_fabric
from tandem_engine.startup import process_start


def main() -> None:
    """Entry point. Exits with 0 after a drain, 1 when the worker failed, 2 for bad flags."""
    try:
        config = parse_args(sys.argv[1:])
        fabric = choose_fabric(os.environ)
    except ConfigError as error:
        sys.stderr.write(f"tandem-worker: {error}\n")
        sys.exit(2)
    try:
        _check_bootstrap_port(config)
    except OSError as error:
        sys.stderr.write(
            f"tandem-worker: --bootstrap-port {config.bootstrap_port} can't be opened: "
            f"{error.strerror or error}; use a free port, or 0\n"
        )
        sys.exit(1)
    # Before the core and its ranks start, which inherit it: libraries read it once.
    os.environ.update(fabric.variables)
    try:
        child = CoreChild.start(config, process_start())
    except OSError as error:
        sys.stderr.write(
            f"tandem-worker: the core process can't be started: {error}; "
            "raise the limits on processes and memory\n"
        )
        sys.exit(1)
    # What the server needs is imported while the core imports what it needs, which takes longer.
    from tandem_engine.server.serving import serve_worker

    sys.exit(serve_worker(config, child, fabric))


def _check_bootstrap_port(config: WorkerConfig) -> None:
    """Raise OSError if another process has the port, which the core opens after loading only."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((config.host, config.bootstrap_port))


if __name__ == "__main__":
    main()
