"""`tandem-worker`: one worker, from its flags to its exit code."""

import sys
from functools import partial

import structlog
import uvloop

from tandem_engine.config import WorkerConfig, parse_args
from tandem_engine.core.process import CoreProcess
from tandem_engine.errors import ConfigError
from tandem_engine.server.logs import configure_logs
from tandem_engine.server.worker import WorkerServer, print_event
from tandem_engine.startup import process_start


async def serve(config: WorkerConfig) -> int:
    """Run one worker; its exit code."""
    spawn = partial(CoreProcess.spawn, began=process_start())
    return await WorkerServer(config, spawn, print_event).run()


def main() -> None:
    """Entry point. Exits with 0 after a drain, 1 when the worker failed, 2 for bad flags."""
    configure_logs()
    log = structlog.get_logger()
    try:
        config = parse_args(sys.argv[1:])
    except ConfigError as error:
        sys.stderr.write(f"tandem-worker: {error}\n")
        sys.exit(2)
    try:
        code = uvloop.run(serve(config))
    except OSError as error:
        log.error("the worker can't start", reason=str(error))
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
