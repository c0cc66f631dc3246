"""A running server with a scripted core."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx

from tandem_engine.config import parse_args
from tandem_engine.errors import CoreDiedError
from tandem_engine.frames import CoreReady, CoreStats, FromCore, SetMode, ToCore
from tandem_engine.server.tests.processes import (
    ADMIN_FLAGS,
    ADMIN_HEADERS,
    DECODER,
    RouterClient,
    until,
)
from tandem_engine.server.worker import WorkerServer
from tandem_engine.startup import StartReport
from tandem_wire.connection import Connection
from tandem_wire.endpoint import dial
from tandem_wire.messages import Hello, WorkerMessage, WorkerState

READY = CoreReady(
    max_model_len=100,
    page_size=16,
    num_blocks=9,
    vocab_size=50,
    eos_token_ids=[2],
    compatibility_hash="beef",
    bootstrap_port=8998,
    startup=StartReport({"import": 2.0, "weights": 0.5}, 10**9),
)


class ScriptedCore:
    """Says what the test tells it to say, and follows mode changes."""

    pid = 4242

    def __init__(self) -> None:
        self.received: list[ToCore] = []
        self.frames: asyncio.Queue[FromCore | CoreDiedError | None] = asyncio.Queue()
        self.mode = WorkerState(role="both")
        self.closed = False

    def send(self, message: ToCore) -> None:
        self.received.append(message)
        if isinstance(message, SetMode):
            self.report(
                role=message.role or self.mode.role,
                draining=self.mode.draining if message.draining is None else message.draining,
            )

    def report(self, **changes: Any) -> None:
        fields = {name: getattr(self.mode, name) for name in WorkerState.__struct_fields__}
        self.mode = WorkerState(**(fields | changes))
        self.say(CoreStats(state=self.mode))

    def say(self, *frames: FromCore | CoreDiedError | None) -> None:
        for frame in frames:
            self.frames.put_nowait(frame)

    async def __aiter__(self) -> AsyncIterator[FromCore]:
        while (frame := await self.frames.get()) is not None:
            if isinstance(frame, CoreDiedError):
                raise frame
            yield frame

    async def close(self, grace_seconds: float = 5.0) -> int:
        self.closed = True
        self.say(None)
        return 0

    def got(self, kind: type) -> Any:
        return next((message for message in self.received if isinstance(message, kind)), None)


class Stage:
    """A running server, its core and its clients."""

    def __init__(self, *flags: str, **env: str) -> None:
        self.core = ScriptedCore()
        ports = ["--http-port", "0", "--wire-port", "0", "--host", "127.0.0.1", *ADMIN_FLAGS]
        config = parse_args(["--mock", "tiny", *ports, *flags], {"POD_NAME": "w", **env})
        self.told: list[dict[str, Any]] = []

        async def connect() -> ScriptedCore:
            return self.core

        self.server = WorkerServer(config, connect, self.told.append)
        self.task = asyncio.create_task(self.server.run())

    @property
    def ports(self) -> dict[str, int]:
        return self.told[-1]

    async def ready(self) -> None:
        self.core.say(READY)
        await until(lambda: self.told and self.told[-1]["event"] == "listening", "ready")

    async def http(self, method: str, path: str, **options: Any) -> httpx.Response:
        await until(lambda: self.told, "the ports")
        options.setdefault("headers", ADMIN_HEADERS)
        async with httpx.AsyncClient() as client:
            return await client.request(
                method, f"http://127.0.0.1:{self.ports['http']}{path}", **options
            )

    async def router(self) -> RouterClient:
        connection = await dial("127.0.0.1", self.ports["wire"], DECODER)
        connection.send(Hello("r"))
        client = RouterClient(connection)
        await until(lambda: client.welcome, "the welcome")
        return client

    async def raw(self) -> Connection[WorkerMessage]:
        return await dial("127.0.0.1", self.ports["wire"], DECODER)

    async def stop(self) -> None:
        if not self.task.done():
            self.core.say(CoreDiedError("the test is over"))
            await self.task
