"""The process around a worker's server: its logs, its events, its event loop, its exit code."""

import logging
import sys
from typing import Any

import msgspec
import structlog
import uvloop

from tandem_engine.config import WorkerConfig
from tandem_engine.core.process import CoreChild, CoreProcess
from tandem_engine.fabric.environment import FabricChoice
from tandem_engine.server.worker import WorkerServer


def configure_logs(*, json: bool | None = None) -> None:
    """Log to stderr: JSON lines, or coloured ones on a terminal, unless `json` says which."""
    as_json = not sys.stderr.isatty() if json is None else json
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def print_event(event: dict[str, Any]) -> None:
    """Write one JSON line to stdout, for whoever started this process."""
    sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
    sys.stdout.flush()


async def _serve(config: WorkerConfig, child: CoreChild, fabric: FabricChoice) -> int:
    async def connect() -> CoreProcess:
        return await CoreProcess.connect(child)

    return await WorkerServer(config, connect, print_event, fabric).run()


def serve_worker(config: WorkerConfig, child: CoreChild, fabric: FabricChoice) -> int:
    """Serve until the worker is drained or fails; its exit code, 0 or 1."""
    configure_logs()
    if fabric.nics:
        structlog.get_logger().info("NICs", **fabric.as_json())
    try:
        return uvloop.run(_serve(config, child, fabric))
    except OSError as error:
        structlog.get_logger().error("the worker can't start", reason=str(error))
        return 1
