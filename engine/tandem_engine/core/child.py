"""The core process: `python -m tandem_engine.core.child FD [BEGAN]`, started by `CoreProcess`."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from tandem_engine.config import WorkerConfig
from tandem_engine.core.engine_core import EngineCore, core_compatibility_hash
from tandem_engine.frames import (
    CoreFailed,
    CoreLoading,
    FromCore,
    Shutdown,
    ToCore,
    pack_frame,
    read_frame,
)
from tandem_engine.handoff.service import start_handoff
from tandem_engine.mock.runner import load_mock_runner
from tandem_engine.startup import Startup, process_start
from tandem_engine.step import Runner

ORPHAN_SECONDS: Final = 5.0
"""How long a core whose server is gone may take to end by itself."""

log = logging.getLogger(__name__)


class Pipe:
    """The child's end of the socket pair; `send` may be called from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToCore] = msgspec.msgpack.Decoder(ToCore)
        self._lock = threading.Lock()
        self._open = True

    def receive_config(self) -> WorkerConfig | None:
        """The first frame; None when the server went away before it."""
        payload = read_frame(self._connection)
        return None if payload is None else msgspec.msgpack.decode(payload, type=WorkerConfig)

    def send(self, message: FromCore) -> None:
        """Send a frame; dropped when the server is gone, which `pump` has noticed too."""
        with self._lock:
            if not self._open:
                return
            try:
                self._connection.sendall(pack_frame(self._encoder.encode(message)))
            except (BrokenPipeError, ConnectionResetError):
                self._open = False

    def pump(self, post: Callable[[ToCore], None]) -> None:
        """Post every frame until the server is gone, then make sure that this process ends."""
        while (payload := read_frame(self._connection)) is not None:
            post(self._decoder.decode(payload))
        post(Shutdown())
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)  # a step or a thread hangs, and no one is left to tell


def load_worker_runner(
    config: WorkerConfig, startup: Startup, fail: Callable[[str], None] | None = None
) -> Runner:
    """The mock or the real runner; torch is imported only for the real one.

    `fail` is called when the runner can't go on and no call is there to raise it.
    """
    if config.is_mock:
        return load_mock_runner(config)
    startup("importing", 0.0)
    from tandem_engine.load.runner import load_runner

    return load_runner(config, startup, fail)


class Relay:
    """Keeps what arrives while the model loads, until there is a core to take it.

    A `Shutdown` before that, which is also what a lost server looks like, ends the process on the
    spot: there is nothing to give back yet, and loading may take minutes.
    """

    def __init__(self) -> None:
        self._core: EngineCore | None = None
        self._early: list[ToCore] = []
        self._lock = threading.Lock()

    def post(self, message: ToCore) -> None:
        """Pass a message on; thread-safe."""
        with self._lock:
            if self._core is not None:
                self._core.post(message)
            elif isinstance(message, Shutdown):
                os._exit(0)
            else:
                self._early.append(message)

    def connect(self, core: EngineCore) -> None:
        """From now on everything goes to `core`."""
        with self._lock:
            self._core = core
            for message in self._early:
                core.post(message)


def run_core(config: WorkerConfig, pipe: Pipe, began: float | None = None) -> int:
    """Load, loop, end; the exit code. `began` is when the worker was started (`boot_seconds`)."""
    relay = Relay()
    threading.Thread(target=pipe.pump, args=(relay.post,), name="pump", daemon=True).start()
    startup = Startup(lambda stage, part: pipe.send(CoreLoading(stage, part)), began)

    def fail(message: str) -> None:
        log.error("the core can't go on: %s", message)
        pipe.send(CoreFailed(message))
        os._exit(1)

    try:
        runner = load_worker_runner(config, startup, fail)
        handoff = start_handoff(config, runner.kv, core_compatibility_hash(config, runner))
        core = EngineCore(config, runner, handoff, pipe.send)
    except Exception as error:
        log.exception("the core can't start")
        pipe.send(CoreFailed(f"{type(error).__name__}: {error}"))
        return 1
    relay.connect(core)
    report = startup.report()
    log.info(report.describe())
    pipe.send(core.ready(handoff.bootstrap_port, report))
    try:
        core.run()
    except Exception:
        return 1  # reported by the loop itself
    return 0


def main() -> None:
    """Entry point of the child."""
    # The server decides when this process ends; a signal to the whole group is meant for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    pipe = Pipe(socket.socket(fileno=int(sys.argv[1])))
    config = pipe.receive_config()
    if config is not None:
        began = float(sys.argv[2]) if len(sys.argv) > 2 else process_start()
        code = run_core(config, pipe, began)
        if code:
            # At exit, libraries may wait for ranks that are gone.
            logging.shutdown()
            os._exit(code)


if __name__ == "__main__":
    main()
