"""An OpenAI endpoint that behaves or misbehaves as a test says, request by request."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

Answer = Callable[["Exchange"], Awaitable[None]]


@dataclass
class Exchange:
    """One request and the way back."""

    path: str
    body: dict[str, Any]
    writer: asyncio.StreamWriter
    number: int = 0

    async def head(self, status: int, content_type: str = "text/event-stream") -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\nconnection: close\r\n\r\n"
        self.writer.write(head.encode())
        await self.writer.drain()

    async def event(self, payload: dict[str, Any] | str) -> None:
        text = payload if isinstance(payload, str) else json.dumps(payload)
        self.writer.write(f"data: {text}\n\n".encode())
        await self.writer.drain()

    async def token(self, text: str = "x") -> None:
        await self.event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})


async def whole(exchange: Exchange) -> None:
    """As many tokens as asked for, usage, [DONE]."""
    await exchange.head(200)
    count = exchange.body["max_tokens"]
    for _ in range(count):
        await exchange.token()
    prompt = exchange.body["prompt"]
    usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
    await exchange.event({"choices": [], "usage": usage})
    await exchange.event("[DONE]")


def status(code: int, message: str = "no") -> Answer:
    """An error before any token."""

    async def answer(exchange: Exchange) -> None:
        await exchange.head(code, "application/json")
        exchange.writer.write(json.dumps({"error": {"message": message}}).encode())

    return answer


async def breaks(exchange: Exchange) -> None:
    """Two tokens, then the connection is gone."""
    await exchange.head(200)
    await exchange.token()
    await exchange.token()


async def fails_inside(exchange: Exchange) -> None:
    """An error event after a token."""
    await exchange.head(200)
    await exchange.token()
    await exchange.event({"error": {"message": "the engine died", "code": 500}})


async def talks_nonsense(exchange: Exchange) -> None:
    """An event that is no JSON."""
    await exchange.head(200)
    await exchange.event("{nonsense")


async def hangs(exchange: Exchange) -> None:
    """A token, then silence for as long as the client stays."""
    await exchange.head(200)
    await exchange.token()
    await asyncio.Event().wait()


async def says_nothing(exchange: Exchange) -> None:
    """A whole stream without tokens."""
    await exchange.head(200)
    await exchange.event("[DONE]")


@dataclass
class ScriptedEndpoint:
    """Answers completions by `script`; takes token ids below `vocab_size` only (0: none)."""

    script: Callable[[int], Answer] = lambda _: whole
    vocab_size: int = 1 << 20
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    open_now: int = 0
    most_open: int = 0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["ScriptedEndpoint"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._answer(reader, writer)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        path = head.split(" ", 2)[1]
        if path == "/v1/models":
            await Exchange(path, {}, writer).head(200, "application/json")
            writer.write(b'{"data": [{"id": "scripted"}]}')
            return
        length = int(head.split("content-length:", 1)[1].split("\r\n", 1)[0])
        body = json.loads(await reader.readexactly(length))
        prompt = body["prompt"]
        if isinstance(prompt, list) and max(prompt) >= self.vocab_size:
            await status(400, "no such token")(Exchange(path, body, writer))
            return
        if body["max_tokens"] == 1:  # the generator's own questions
            await whole(Exchange(path, body, writer))
            return
        self.bodies.append(body)
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        number = len(self.bodies) - 1
        answering = asyncio.create_task(
            _run(self.script(number), Exchange(path, body, writer, number))
        )
        gone = asyncio.create_task(reader.read())  # returns when the client goes away
        await asyncio.wait([answering, gone], return_when=asyncio.FIRST_COMPLETED)
        self.open_now -= 1
        answering.cancel()
        gone.cancel()


async def _run(answer: Answer, exchange: Exchange) -> None:
    with contextlib.suppress(ConnectionError):
        await answer(exchange)
