"""A whole router on a free port, inside the test's own loop, in front of fake workers."""

import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
from deadlines import patience
from starlette.types import ASGIApp

from tandem_router.api.context import RouterContext
from tandem_router.app import build_app, build_metrics_app
from tandem_router.config import RouterConfig
from tandem_router.discovery.source import Discovery
from tandem_router.http_server import HttpServer, open_listener
from tandem_router.router import running_router
from tandem_router.tests.fake_worker import FakeWorker
from tandem_router.text.loading import load_text_model
from tandem_router.text.model import TextModel

BASE = RouterConfig(
    model_name="mock", model="mock://tiny", queue_seconds=5.0, failover_seconds=30.0
)


async def until(condition: Callable[[], Any], *, seconds: float = 20.0) -> None:
    """Wait for a condition; fails with it after `seconds`."""
    deadline = time.monotonic() + patience(seconds)
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {condition}"
        await asyncio.sleep(0.005)


@dataclass
class Running:
    """A router under test."""

    context: RouterContext
    url: str
    http: httpx.AsyncClient
    monitor: httpx.AsyncClient
    """Of the port for metrics."""
    keys_file: Path

    def openai(self, key: str = "none") -> openai.AsyncOpenAI:
        """The official client; the caller closes it."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        """A JSON request."""
        return await self.http.post(path, json=body)

    async def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream, without the closing [DONE], which must be there."""
        found: list[dict[str, Any]] = []
        done = False
        async with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                assert not done or not line
                if line == "data: [DONE]":
                    done = True
                elif line:
                    found.append(json.loads(line.removeprefix("data: ")))
        assert done or "error" in found[-1]
        return found


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    """The text of a completion stream."""
    return "".join(
        choice["text"]
        for event in events
        for choice in event.get("choices", ())
        if choice["index"] == index
    )


@contextlib.asynccontextmanager
async def router(
    *workers: FakeWorker,
    text: TextModel | None = None,
    discovery: Discovery | None = None,
    wait: bool = True,
    api_keys: tuple[str, ...] = (),
    **settings: Any,
) -> AsyncIterator[Running]:
    """A router in front of `workers`, ready once they have welcomed it."""
    for worker in workers:
        if not worker.port:
            await worker.start()
    config = replace(BASE, workers=tuple(worker.address for worker in workers), **settings)
    text = text or load_text_model(config.model)
    async with contextlib.AsyncExitStack() as stack:
        keys_file = stack.enter_context(_keys_in_a_file(api_keys))
        config = replace(config, api_keys_file=str(keys_file) if api_keys else "")
        context = await stack.enter_async_context(running_router(config, text, discovery))
        http, monitor = [
            await stack.enter_async_context(_serving(app, config))
            for app in (build_app(context), build_metrics_app(context))
        ]
        if wait:
            await until(
                lambda: sum(link.is_connected for link in context.fleet.links) >= len(workers)
            )
        yield Running(context, str(http.base_url), http, monitor, keys_file)
    for worker in workers:
        await worker.die()


@contextlib.asynccontextmanager
async def _serving(app: ASGIApp, config: RouterConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application on a free port."""
    server = HttpServer(app, config)
    listener = open_listener("127.0.0.1", 0, "--port")
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    async with httpx.AsyncClient(base_url=url, timeout=patience(60)) as http:
        try:
            yield http
        finally:
            server.should_exit = True
            server.force_exit = True
            await serving


@contextlib.contextmanager
def _keys_in_a_file(api_keys: tuple[str, ...]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "keys")
        path.write_text("\n".join(api_keys))
        yield path
