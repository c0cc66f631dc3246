"""A worker's server around a core that was started before: logs, event loop, exit code."""

import structlog
import uvloop

from tandem_engine.config import WorkerConfig
from tandem_engine.core.process import CoreChild, CoreProcess
from tandem_engine.server.logs import configure_logs
from tandem_engine.server.worker import WorkerServer, print_event


async def _serve(config: WorkerConfig, child: CoreChild) -> int:
    async def connect(_: WorkerConfig) -> CoreProcess:
        return await CoreProcess.connect(child)

    return await WorkerServer(config, connect, print_event).run()


def serve_worker(config: WorkerConfig, child: CoreChild) -> int:
    """Serve until the worker is drained or fails; its exit code, 0 or 1."""
    configure_logs()
    try:
        return uvloop.run(_serve(config, child))
    except OSError as error:
        structlog.get_logger().error("the worker can't start", reason=str(error))
        return 1
