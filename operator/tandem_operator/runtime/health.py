"""/healthz, /readyz and /metrics of the operator."""

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest


class HealthServer:
    """Two small HTTP servers.

    Any answer shows that the event loop runs, which is all that /healthz checks: when the watches
    or the lease end, the process ends too.
    """

    def __init__(self, registry: CollectorRegistry, health_port: int, metrics_port: int) -> None:
        self._registry = registry
        self._ports = (health_port, metrics_port)
        self._runners: list[web.AppRunner] = []

    async def start(self) -> None:
        """Start to listen on both ports."""
        health = web.Application()
        # A standby is ready too: its work is to wait.
        for path in ("/healthz", "/readyz"):
            health.router.add_get(path, self._alive)
        metrics = web.Application()
        metrics.router.add_get("/metrics", self._metrics)
        for app, port in zip((health, metrics), self._ports, strict=True):
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "0.0.0.0", port).start()
            self._runners.append(runner)

    async def stop(self) -> None:
        """Stop both servers."""
        for runner in self._runners:
            await runner.cleanup()

    async def _alive(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )
