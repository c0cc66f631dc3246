"""/healthz, /readyz and /metrics of the operator."""

from collections.abc import Mapping

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest


class HealthServer:
    """Two small HTTP servers.

    Any answer shows that the event loop runs, which is all that /healthz checks: when the watches
    or the lease end, the process ends too. /readyz answers 503 and says why, while something that
    this process should serve is not served.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        health_port: int,
        metrics_port: int,
        problems: Mapping[str, str],
    ) -> None:
        """`problems` is looked at by each request: why a namespace is not served, by its name."""
        self._registry = registry
        self._problems = problems
        self._ports = (health_port, metrics_port)
        self._runners: list[web.AppRunner] = []

    async def start(self) -> None:
        """Start to listen on both ports."""
        health = web.Application()
        health.router.add_get("/healthz", self._alive)
        health.router.add_get("/readyz", self._ready)
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

    async def _ready(self, _: web.Request) -> web.Response:
        # A standby is ready too: its work is to wait.
        lines = [f"not served: {name}: {why}\n" for name, why in sorted(self._problems.items())]
        return web.Response(text="".join(lines) or "ok\n", status=503 if lines else 200)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )
