"""What the router costs: added latency per request and CPU per streamed token.

A load generator and a bare worker (both in this process, speaking raw HTTP and the wire) sit on
either side of a router in a process of its own. The worker stamps every token with the time at
which its frame was written; the client takes the time at which the chunk arrived. The difference,
less that of the same path without a router (the client speaking the wire itself), is what the
router adds. CPU is the router process's own, from /proc. Figures are of this machine, in this run.
"""

import asyncio
import contextlib
import os
import socket
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from tandem_bench.options import option
from tandem_wire.connection import Connection
from tandem_wire.endpoint import dial, listen
from tandem_wire.messages import (
    Cancel,
    Hello,
    Ping,
    Pong,
    RouterMessage,
    SamplingParams,
    Step,
    StepItem,
    Submit,
    Welcome,
    WorkerMessage,
    WorkerState,
)

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
LETTER = ord("x")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a router adds: latency per request, and CPU per streamed token."""

    streams: int = option(64, "Requests.", minimum=1)
    tokens: int = option(200, "Tokens of each answer.", minimum=1)
    rate: float = option(0.0, "Requests per second; 0: all at once.")
    step_milliseconds: float = option(20.0, "Pace of the worker's steps.")
    prompt_characters: int = option(2000, "Length of each prompt.")


@dataclass
class Stamps:
    """When a stream's tokens left the worker and reached the client, by position."""

    sent: list[float] = field(default_factory=list)
    received: list[float] = field(default_factory=list)


class BareWorker:
    """Steps all its requests at a fixed pace, one frame per step, and notes when."""

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._running: dict[str, tuple[Connection[RouterMessage], int, Stamps]] = {}
        self.stamps: dict[int, Stamps] = {}

    async def serve(self, connection: Connection[RouterMessage]) -> None:
        """One router's connection."""
        await connection.receive()
        connection.send(
            Welcome(
                worker_id="bench",
                boot_id="bench",
                role="both",
                model="bench",
                compatibility_hash="",
                max_model_len=1 << 20,
                page_size=64,
                num_blocks=1 << 20,
                vocab_size=512,
                eos_token_ids=[257],
                bootstrap_host="127.0.0.1",
                bootstrap_port=0,
            )
        )
        state = WorkerState(role="both", num_free_blocks=1 << 20, num_blocks=1 << 20)
        connection.send(state)
        async for message in connection:
            if isinstance(message, Submit):
                stamps = self.stamps[message.params.seed] = Stamps()
                self._running[message.rid] = (connection, message.params.max_tokens, stamps)
            elif isinstance(message, Cancel):
                self._running.pop(message.rid, None)
            elif isinstance(message, Ping):
                connection.send(Pong(message.number))

    async def step_forever(self) -> None:
        """One frame per connection and step."""
        while True:
            await asyncio.sleep(self._step_seconds)
            frames: dict[Connection[RouterMessage], list[StepItem]] = {}
            now = time.perf_counter()
            for rid, (connection, left, stamps) in list(self._running.items()):
                finish: Literal["length", ""] = "length" if left == 1 else ""
                frames.setdefault(connection, []).append(StepItem(rid, [LETTER], finish))
                stamps.sent.append(now)
                if finish:
                    del self._running[rid]
                else:
                    self._running[rid] = (connection, left - 1, stamps)
            for connection, items in frames.items():
                connection.send(Step(items))


async def stream_http(port: int, seed: int, load: Options) -> Stamps:
    """One streamed completion over a raw socket; counts events by their separator."""
    body = msgspec.json.encode(
        {
            "model": "bench",
            "prompt": "p" * load.prompt_characters,
            "max_tokens": load.tokens,
            "stream": True,
            "seed": seed,
        }
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: b\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    stamps = Stamps()
    while True:
        data = await reader.read(1 << 16)
        now = time.perf_counter()
        assert data, "the router closed the connection"
        stamps.received += [now] * data.count(b'"finish_reason"')
        if b"[DONE]" in data:
            break
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    assert len(stamps.received) == load.tokens, f"{len(stamps.received)} of {load.tokens} tokens"
    return stamps


async def stream_direct(worker_port: int, load: Options) -> dict[int, Stamps]:
    """All streams without a router: this client speaks the wire itself."""
    decoder: msgspec.msgpack.Decoder[WorkerMessage] = msgspec.msgpack.Decoder(WorkerMessage)
    connection = await dial("127.0.0.1", worker_port, decoder)
    connection.send(Hello("direct"))
    stamps = {seed: Stamps() for seed in range(load.streams)}
    for seed in stamps:
        params = SamplingParams(max_tokens=load.tokens, seed=seed)
        connection.send(Submit(rid=str(seed), tokens=[1], num_prompt_tokens=1, params=params))
    left = load.streams
    while left:
        messages = await connection.receive_many()
        now = time.perf_counter()
        for message in messages:
            if isinstance(message, Step):
                for item in message.items:
                    stamps[int(item.rid)].received.append(now)
                    left -= bool(item.finish)
    await connection.close()
    return stamps


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def delays(worker: BareWorker, received: dict[int, Stamps]) -> list[float]:
    """Seconds from a frame's write to its arrival, of every token."""
    found: list[float] = []
    for seed, stamps in received.items():
        sent = worker.stamps[seed].sent
        found += [got - put for got, put in zip(stamps.received, sent, strict=True)]
    return found


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds."""
    cuts = statistics.quantiles(values, n=100)
    return {f"p{at}": round(cuts[at - 1] * 1e3, 3) for at in (50, 90, 99)}


async def run_streams(port: int, load: Options) -> dict[int, Stamps]:
    """All streams, paced by `rate`."""

    async def one(seed: int) -> Stamps:
        if load.rate:
            await asyncio.sleep(seed / load.rate)
        return await stream_http(port, seed, load)

    done = await asyncio.gather(*(one(seed) for seed in range(load.streams)))
    return dict(enumerate(done))


async def measure(load: Options) -> dict[str, Any]:
    """One comparison: direct, then through a router."""
    worker = BareWorker(load.step_milliseconds / 1e3)
    decoder: msgspec.msgpack.Decoder[RouterMessage] = msgspec.msgpack.Decoder(RouterMessage)
    listener = await listen("127.0.0.1", 0, decoder, worker.serve)
    stepping = asyncio.create_task(worker.step_forever())
    direct = await stream_direct(listener.port, load)
    without = delays(worker, direct)
    port = _free_port()
    router = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tandem_router.main", "--model", "mock://bench"),
        *("--model-name", "bench", "--host", "127.0.0.1", "--port", str(port)),
        *("--worker", f"127.0.0.1:{listener.port}", "--no-access-log", "--log-level", "error"),
    )
    try:
        await _until_ready(port)
        await run_streams(port, replace(load, streams=4, tokens=20, rate=0.0))
        before = cpu_seconds(router.pid)
        started = time.perf_counter()
        received = await run_streams(port, load)
        seconds = time.perf_counter() - started
        cpu = cpu_seconds(router.pid) - before
    finally:
        router.terminate()
        await router.wait()
        stepping.cancel()
        await listener.close()
    through = delays(worker, received)
    tokens = load.streams * load.tokens
    direct_ms, through_ms = percentiles(without), percentiles(through)
    return {
        "streams": load.streams,
        "tokens_per_stream": load.tokens,
        "requests_per_second": load.rate or "all at once",
        "tokens_per_second": round(tokens / seconds),
        "token_delay_direct_ms": direct_ms,
        "token_delay_router_ms": through_ms,
        "added_ms": {at: round(through_ms[at] - direct_ms[at], 3) for at in through_ms},
        "router_cpu_us_per_token": round(cpu / tokens * 1e6, 1),
        "router_cpu_share": round(cpu / seconds, 3),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _until_ready(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /ready HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
            if b" 200 " in answer.split(b"\r\n", 1)[0]:
                return
        await asyncio.sleep(0.05)
    raise TimeoutError("the router never became ready")


def run(options: Options) -> None:
    """Measure, and print one JSON object."""
    import uvloop

    result = uvloop.run(measure(options))
    print(msgspec.json.format(msgspec.json.encode(result), indent=2).decode())
