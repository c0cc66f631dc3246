"""What reaches the router before it is a request: heads, upgrades, bodies in codings, time."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from tandem_router.tests.fake_worker import FakeWorker, saying
from tandem_router.tests.harness import Running, router

COMPLETION = json.dumps({"model": "mock", "prompt": "x", "max_tokens": 5}).encode()
H2C = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"


class Raw:
    """A connection that sends what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, running: Running) -> "Raw":
        port = int(running.url.rsplit(":", 1)[1])
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await self.reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers, body

    async def ask(self, head: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        self.writer.write(head.encode() + b"\r\n" + body)
        return await self.answer()

    def close(self) -> None:
        self.writer.close()


def post(extra: str = "", path: str = "/v1/completions") -> str:
    return f"POST {path} HTTP/1.1\r\nhost: r\r\n{extra}content-length: {len(COMPLETION)}\r\n"


@pytest.mark.parametrize("extra", [H2C, "connection: Upgrade\r\nupgrade: websocket\r\n"])
async def test_an_upgrade_is_ignored_and_the_request_served(extra: str) -> None:
    async with router(FakeWorker(script=saying("hello"))) as running:
        raw = await Raw.open(running)
        for _ in range(2):  # the connection stays usable
            status, _, body = await raw.ask(post(extra), COMPLETION)
            assert status == 200, body
            assert json.loads(body)["choices"][0]["text"] == "hello"
        # As one write, as two, without a length, and without a body.
        raw.writer.write(post(extra).encode() + b"\r\n" + COMPLETION + post().encode() + b"\r\n")
        assert (await raw.answer())[0] == 200
        raw.writer.write(COMPLETION)
        assert (await raw.answer())[0] == 200
        raw.writer.write(post(extra).encode() + b"\r\n")
        await raw.writer.drain()
        raw.writer.write(COMPLETION[:7])
        await raw.writer.drain()
        raw.writer.write(COMPLETION[7:])
        assert (await raw.answer())[0] == 200
        chunked = (
            f"POST /v1/completions HTTP/1.1\r\nhost: r\r\n{extra}transfer-encoding: chunked\r\n"
        )
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(COMPLETION), COMPLETION)
        assert (await raw.ask(chunked, body))[0] == 200
        assert (await raw.ask(f"GET /health HTTP/1.1\r\nhost: r\r\n{extra}"))[0] == 200
        raw.close()


async def test_connect_is_refused() -> None:
    async with router(FakeWorker()) as running:
        raw = await Raw.open(running)
        status, _, body = await raw.ask("CONNECT example.org:443 HTTP/1.1\r\nhost: r\r\n")
        assert status == 400
        assert json.loads(body)["error"]["message"]
        raw.close()


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(lambda: (b"a" * 65536 for _ in range(3200)), id="one endless value"),
        pytest.param(lambda: (b"n%d: v\r\n" % i for i in range(200)), id="many lines"),
        pytest.param(
            lambda: (b"n%d: %s\r\n" % (i, b"v" * 8000) for i in range(20)), id="long lines"
        ),
    ],
)
async def test_a_head_has_bounds(flood: Callable[[], Iterator[bytes]]) -> None:
    async with router(FakeWorker()) as running:
        raw = await Raw.open(running)
        raw.writer.write(b"GET /health HTTP/1.1\r\nhost: r\r\nx: ")
        answering = asyncio.create_task(raw.answer())
        sent = 0
        for part in flood():
            if answering.done():
                break
            raw.writer.write(part)
            sent += len(part)
            await asyncio.sleep(0)
        status, headers, body = await answering
        assert status == 431
        assert json.loads(body)["error"]["code"] == "head_too_large"
        assert headers["connection"] == "close"
        assert sent < 8 << 20
        raw.close()


async def test_a_long_request_line_and_trailers_have_bounds_too() -> None:
    async with router(FakeWorker()) as running:
        raw = await Raw.open(running)
        raw.writer.write(b"GET /" + b"x" * 70000)
        assert (await raw.answer())[0] == 431
        raw.close()
        raw = await Raw.open(running)
        raw.writer.write(
            b"POST /tokenize HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        raw.writer.write(b"0\r\n" + b"".join(b"t%d: v\r\n" % i for i in range(200)))
        await raw.reader.read()  # closed, not kept
        raw.close()
        # A head as long as clients send them, and a long body, are no trouble.
        raw = await Raw.open(running)
        cookie = f"cookie: {'c' * 30000}\r\n"
        assert (await raw.ask(post(cookie), COMPLETION))[0] == 200
        body = b'{"prompt": "%s"}' % (b"y" * 1_000_000)
        head = f"POST /tokenize HTTP/1.1\r\nhost: r\r\ncontent-length: {len(body)}\r\n"
        assert (await raw.ask(head, body))[0] == 200
        raw.close()


async def test_a_head_must_come_in_time() -> None:
    async with router(FakeWorker(step_seconds=0.05), head_seconds=0.3) as running:
        silent, slow = await Raw.open(running), await Raw.open(running)
        slow.writer.write(b"GET /health HTTP/1.1\r\nhost:")
        status, _, body = await slow.answer()
        assert status == 408
        assert json.loads(body)["error"]["code"] == "request_timeout"
        assert await silent.reader.read() == b""
        # An answer may take longer than that, also with the next head half sent behind it.
        busy = await Raw.open(running)
        long = json.dumps({"prompt": "x", "model": "mock", "max_tokens": 12}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-length: {len(long)}\r\n\r\n"
        busy.writer.write(head.encode() + long + b"GET /health HT")
        assert (await busy.answer())[0] == 200
        busy.writer.write(b"TP/1.1\r\nhost: r\r\n\r\n")
        assert (await busy.answer())[0] == 200
        for raw in (silent, slow, busy):
            raw.close()


async def test_a_body_must_come_in_time() -> None:
    async with router(FakeWorker(), body_seconds=0.2) as running:
        raw = await Raw.open(running)
        status, headers, _ = await raw.ask(post(), COMPLETION[:5])
        assert (status, headers["connection"]) == (408, "close")
        raw.close()


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "pack"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("GZIP", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("identity", bytes),
    ],
)
async def test_bodies_are_decoded(coding: str, pack: Callable[[bytes], bytes]) -> None:
    async with router(FakeWorker()) as running:
        headers = {"content-encoding": coding}
        for path in ("/v1/completions", "/tokenize"):
            content = pack(COMPLETION)
            answer = await running.http.post(path, content=content, headers=headers)
            assert answer.status_code == 200, answer.text


async def test_bodies_in_other_codings_are_refused_with_the_list() -> None:
    async with router(FakeWorker()) as running:
        for coding in ("br", "zstd", "gzip, gzip"):
            answer = await running.http.post(
                "/v1/completions", content=COMPLETION, headers={"content-encoding": coding}
            )
            assert answer.status_code == 415
            assert answer.headers["accept-encoding"] == "gzip, deflate, identity"
            assert "gzip, deflate, identity" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (gzip.compress(b"x" * (200 << 20)), 413, "body_too_large"),
        (gzip.compress(b"x") * 1000, 400, "invalid_body"),
        (gzip.compress(COMPLETION)[:-9], 400, "invalid_body"),
        (COMPLETION, 400, "invalid_body"),
        (gzip.compress(COMPLETION) + b"tail", 400, "invalid_body"),
    ],
    ids=["bomb", "members", "cut off", "not packed", "tail"],
)
async def test_wrongly_packed_bodies(content: bytes, status: int, code: str) -> None:
    async with router(FakeWorker(), max_body_bytes=1 << 20) as running:
        answer = await running.http.post(
            "/v1/completions", content=content, headers={"content-encoding": "gzip"}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_answers_are_dated() -> None:
    async with router(FakeWorker()) as running:
        for path in ("/health", "/v1/models", "/nowhere"):
            assert "GMT" in (await running.http.get(path)).headers["date"]


async def test_a_body_too_large_stays_413() -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 100

    async with router(FakeWorker(), max_body_bytes=1000) as running:
        answer = await running.http.post("/v1/completions", content=parts())
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
