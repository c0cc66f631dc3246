"""/healthz, /readyz and /metrics of the operator."""

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest


class HealthServer:
    """Two small HTTP servers. `problem` returns why the process is not well, or ""."""

    def __init__(
        self,
        registry: CollectorRegistry,
        problem: Callable[[], str],
        health_port: int,
        metrics_port: int,
    ) -> None:
        self._registry = registry
        self._problem = problem
        self._ports = (health_port, metrics_port)
        self._runners: list[web.AppRunner] = []

    async def start(self) -> None:
        """Listen."""
        health = web.Application()
        health.router.add_get("/healthz", self._healthz)
        health.router.add_get("/readyz", self._readyz)
        metrics = web.Application()
        metrics.router.add_get("/metrics", self._metrics)
        for app, port in zip((health, metrics), self._ports, strict=True):
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "0.0.0.0", port).start()
            self._runners.append(runner)

    async def stop(self) -> None:
        """Close both."""
        for runner in self._runners:
            await runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        problem = self._problem()
        return web.Response(text=problem or "ok\n", status=500 if problem else 200)

    async def _readyz(self, _: web.Request) -> web.Response:
        # A standby is ready: it does its work, which is to wait.
        return web.Response(text="ok\n")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )
