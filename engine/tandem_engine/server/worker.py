"""One worker's server: connects to the core, carries its frames, drains, ends."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final, Protocol

import structlog
import uvicorn

from tandem_engine.config import WorkerConfig
from tandem_engine.doctor.examine import look_around, troubles
from tandem_engine.errors import CoreDiedError
from tandem_engine.fabric.environment import NO_FABRIC, FabricChoice
from tandem_engine.frames import (
    CoreFailed,
    CoreLoading,
    CoreReady,
    CoreRefused,
    CoreStats,
    CoreStep,
    FromCore,
    LeaseReport,
    ProbeResult,
    SetMode,
    ToCore,
)
from tandem_engine.server.admin import AdminApp
from tandem_engine.server.metrics import WorkerMetrics
from tandem_engine.server.routers import RouterHub
from tandem_engine.server.status import WorkerStatus
from tandem_wire.messages import KvEvents

log = structlog.get_logger()

MOVE_SECONDS: Final = 5.0
"""How long streams may take to move away when a drain is out of time."""


class CoreClient(Protocol):
    """A running core: frames in, frames out. `core.process.CoreProcess` is one."""

    @property
    def pid(self) -> int:
        """Process id of the core."""

    def send(self, message: ToCore) -> None:
        """Send a frame; returns at once."""

    def __aiter__(self) -> AsyncIterator[FromCore]:
        """Frames until `close`; raises CoreDiedError when the core ended by itself."""

    async def close(self, grace_seconds: float = 5.0) -> int:
        """End the core; its exit code."""


Connect = Callable[[], Awaitable[CoreClient]]


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: signals are the worker's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class WorkerServer:
    """The life of a worker process. `run` returns the exit code: 0 after a drain, 1 otherwise."""

    def __init__(
        self,
        config: WorkerConfig,
        connect: Connect,
        announce: Callable[[dict[str, Any]], None],
        fabric: FabricChoice = NO_FABRIC,
    ) -> None:
        self._config = config
        self._connect = connect
        self._announce = announce
        self._core: CoreClient | None = None
        self._signals = 0
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._status = WorkerStatus(config, fabric)
        self._hub = RouterHub(self._status, self._to_core)
        self._metrics = WorkerMetrics(self._status)
        self._admin = AdminApp(self._status, self._hub, self._metrics, self._to_core)

    def _to_core(self, message: ToCore) -> None:
        if self._core is not None:
            self._core.send(message)

    async def run(self) -> int:
        """Serve until a signal or the core's death."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        self._look_around()
        http_socket = self._bind_http()
        self._status.ports["http"] = http_socket.getsockname()[1]
        self._status.ports["wire"] = await self._open_wire()
        self._announce({"event": "starting", **self._status.ports})
        http = _Http(
            uvicorn.Config(
                self._admin.app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=3,
            )
        )
        serving = loop.create_task(http.serve(sockets=[http_socket]))
        try:
            await self._run_core()
        finally:
            await self._hub.close()
            http.should_exit = True
            await serving
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        if self._status.error:
            # The last line: the operator keeps the end of the log as evidence.
            log.error("the worker ends", reason=self._status.error)
            return 1
        log.info("the worker ends after its drain")
        return 0

    def _look_around(self) -> None:
        """Check what the transport needs of this machine, and say what is missing."""
        wanted = self._config.transfer
        self._status.checks = troubles(look_around(wanted, self._config.shm_dir), wanted)
        for check in self._status.checks:
            say = log.error if check.verdict == "fail" else log.warning
            say(f"{check.name} {check.subject}: {check.finding}", remedy=check.remedy)

    def _bind_http(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._config.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self._config.host, self._config.http_port))
            # Bound but silent sockets don't exclude each other.
            listening.listen()
        except OSError as error:
            listening.close()
            raise _taken("--http-port", self._config.http_port, error) from None
        return listening

    async def _open_wire(self) -> int:
        port = self._config.wire_port
        try:
            return await self._hub.open(self._config.host, port)
        except OSError as error:
            raise _taken("--wire-port", port, error) from None

    async def _run_core(self) -> None:
        self._core = core = await self._connect()
        self._status.core_pid = core.pid
        frames = asyncio.create_task(self._read_core(core))
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait([frames, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not frames.done():
            drained = asyncio.create_task(self._drain())
            await asyncio.wait([frames, drained], return_when=asyncio.FIRST_COMPLETED)
            drained.cancel()
        stopping.cancel()
        # The core gives its requests back while it closes; `frames` carries that to the routers.
        await core.close()
        await asyncio.wait([frames])

    # --- the core's frames ------------------------------------------------------------------------

    async def _read_core(self, core: CoreClient) -> None:
        try:
            async for frame in core:
                await self._handle(frame)
                if self._status.error:
                    return
        except CoreDiedError as error:
            self._status.error = str(error)
        finally:
            await self._status.changed()

    async def _handle(self, frame: FromCore) -> None:
        match frame:
            case CoreStep():
                self._hub.step(frame)
            case CoreStats():
                self._status.stats = frame
                self._status.num_reports += 1
                self._metrics.update(frame)
                self._hub.broadcast_state()
                await self._status.changed()
            case CoreRefused():
                self._hub.refuse(frame)
            case KvEvents():
                self._hub.kv_events(frame)
            case ProbeResult() | LeaseReport():
                self._admin.answer(frame)
            case CoreLoading():
                self._status.loading = frame
                log.info("loading", stage=frame.stage, percent=round(100 * frame.fraction))
            case CoreReady():
                self._become_ready(frame)
                await self._status.changed()
            case CoreFailed():
                self._status.error = frame.message

    def _become_ready(self, ready: CoreReady) -> None:
        self._status.ready = ready
        self._status.ports["bootstrap"] = ready.bootstrap_port
        log.info(
            "ready",
            worker=self._config.worker_id,
            model=self._config.served_model_name,
            blocks=ready.num_blocks,
            compatibility=ready.compatibility_hash,
            startup=ready.startup.as_json() if ready.startup else None,
        )
        self._announce({"event": "listening", **self._status.ports})

    # --- the end ----------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        self._signals += 1
        self._stop.set()
        if self._signals > 1:
            self._hurry.set()

    async def _drain(self) -> None:
        """Refuse new work, wait until streams end and leases reach zero, or move what is left."""
        self._status.stopping = True
        self._hub.broadcast_state()
        if self._status.ready is None:
            return
        log.info(
            "draining", seconds=self._config.drain_seconds, leases=self._status.state.num_leases
        )
        # Reports from before the core has heard of it say nothing about the drain.
        self._status.stats = None
        self._to_core(SetMode(draining=True))
        idle = asyncio.create_task(
            self._status.wait_for(self._is_drained, self._config.drain_seconds)
        )
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait([idle, hurry], return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not (idle.done() and idle.result()):
            idle.cancel()
            log.warning("moving what is left", running=len(self._hub.running))
            self._to_core(SetMode(draining=True, move_streams=True))
            if not self._hurry.is_set():
                await self._status.wait_for(self._is_drained, MOVE_SECONDS)

    def _is_drained(self) -> bool:
        return self._status.stats is not None and self._status.is_idle()


def _taken(flag: str, port: int, error: OSError) -> OSError:
    """What is wrong with a port, and what to do."""
    reason = error.strerror or str(error)
    return OSError(error.errno, f"{flag} {port} can't be opened: {reason}; use a free port, or 0")
