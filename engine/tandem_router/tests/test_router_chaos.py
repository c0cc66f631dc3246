"""Blows to whole worker processes under load: every answer is that of an undisturbed run.

Real routers and mock workers; the mock checks its KV at every step. Half of the requests sample
with a seed, every fifth is answered in one piece.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from deadlines import patience

from tandem_router.tests.test_router_process import (
    Front,
    Process,
    free_port,
    until_async,
    until_connected,
    worker,
)

PROFILE = "tiny?decode_ms=20&prefill_ms=10"
NUM_REQUESTS = 40
NUM_BEGUN = 20  # streams with a first token when the blow falls
Answer = tuple[str, str]


@dataclass
class Worker:
    """A worker process, of a server and a core, and its admin port."""

    process: Process
    url: str

    async def state(self) -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=patience(30)) as client:
            state: dict[str, Any] = (await client.get(f"{self.url}/state")).json()
            return state

    async def signal(self, number: int) -> Callable[[int], None]:
        """Signal server and core at once, as a pod's; a function that does so again."""
        assert self.process.child is not None
        pids = (await self.state())["core_pid"], self.process.child.pid

        def again(number: int) -> None:
            for pid in pids:
                os.kill(pid, number)

        again(number)
        return again

    async def restart(self) -> None:
        assert self.process.child is not None
        await self.process.child.wait()
        await self.process.start()

    async def num_kept(self) -> int:
        """Requests, leases and blocks that are not free."""
        state = await self.state()
        ledger = state["ledger"]
        blocks = int(ledger["owned"] + ledger["leased"] + ledger["leaked"])
        return len(state["running"]) + int(state["leases"]) + blocks


@dataclass
class Fleet:
    """p0, p1, d0 and d1 behind two routers."""

    workers: dict[str, Worker]
    routers: list[Process]
    fronts: list[Front]

    async def settle(self) -> None:
        """Every worker is connected to every router and holds nothing."""
        for front in self.fronts:
            await until_connected(front.monitor, len(self.workers))

        async def clean() -> float:
            return float(not any([await found.num_kept() for found in self.workers.values()]))

        await until_async(clean, 1, seconds=60)


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:

        async def start(process: Process) -> Process:
            await process.start()
            stack.push_async_callback(process.stop)
            return process

        workers, flags = {}, []
        for name, role in (
            ("p0", "prefill"),
            ("p1", "prefill"),
            ("d0", "decode"),
            ("d1", "decode"),
        ):
            wire, http = free_port(), free_port()
            process = worker(path, name, role, wire, PROFILE)
            process.flags = (*process.flags, "--http-port", str(http))
            workers[name] = Worker(await start(process), f"http://127.0.0.1:{http}")
            flags += ["--worker", f"127.0.0.1:{wire}"]
        routers, fronts = [], []
        for name in ("r0", "r1"):
            front = Front()
            fixed = ("--model", "mock://tiny", "--model-name", "mock", "--host", "127.0.0.1")
            process = Process(
                path / f"{name}.log", "tandem_router.main", *fixed, *front.flags, *flags
            )
            routers.append(await start(process))
            fronts.append(front)
        fleet = Fleet(workers, routers, fronts)
        await fleet.settle()
        yield fleet


async def ask(
    client: httpx.AsyncClient, fleet: Fleet, number: int, retries: int, begun: asyncio.Semaphore
) -> Answer:
    """Text and finish reason; with retries, over the other router when a connection breaks."""
    body: dict[str, Any] = {
        "model": "mock",
        "prompt": f"request {number}: " + "lorem ipsum " * (number % 17),
        "max_tokens": 60 + number,
        "stream": number % 5 != 0,
        **({"temperature": 0.8, "seed": number} if number % 2 else {"temperature": 0}),
    }
    for attempt in range(retries + 1):
        url = f"{fleet.fronts[(number + attempt) % 2].url}/v1/completions"
        try:
            if body["stream"]:
                return await _read_stream(client, url, body, begun)
            reply = await client.post(url, json=body)
            assert reply.status_code == 200, reply.text
            choice = reply.json()["choices"][0]
            return choice["text"], choice["finish_reason"]
        except httpx.TransportError:
            if attempt == retries:
                raise
    raise AssertionError("not reached")


async def _read_stream(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], begun: asyncio.Semaphore
) -> Answer:
    text = finish = ""
    async with client.stream("POST", url, json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = httpx.Response(200, text=line.removeprefix("data: ")).json()
            assert "error" not in event, event
            if not text:
                begun.release()
            for choice in event["choices"]:
                text += choice["text"]
                finish = choice["finish_reason"] or finish
    return text, finish


async def answers(
    fleet: Fleet, disturb: Callable[[], Awaitable[None]] | None = None, retries: int = 0
) -> list[Answer]:
    async with httpx.AsyncClient(
        timeout=patience(120), limits=httpx.Limits(max_connections=None)
    ) as client:
        begun = asyncio.Semaphore(0)
        requests = [
            asyncio.create_task(ask(client, fleet, number, retries, begun))
            for number in range(NUM_REQUESTS)
        ]
        if disturb is not None:
            for _ in range(NUM_BEGUN):
                await begun.acquire()
            await disturb()
        return await asyncio.gather(*requests)


@pytest.mark.slow
async def test_no_blow_changes_an_answer(tmp_path: Path) -> None:
    async with running(tmp_path) as fleet:
        workers = fleet.workers

        async def kill(*names: str) -> None:
            for name in names:
                await workers[name].signal(signal.SIGKILL)
            await asyncio.gather(*(workers[name].restart() for name in names))

        async def kill_core(name: str) -> None:
            os.kill((await workers[name].state())["core_pid"], signal.SIGKILL)
            await workers[name].restart()

        async def freeze(name: str) -> None:
            """Until the other side has noticed."""
            again = await workers[name].signal(signal.SIGSTOP)

            async def lost() -> float:
                async with httpx.AsyncClient(timeout=patience(30)) as client:
                    state = (await client.get(f"{fleet.fronts[0].monitor}/state")).json()
                return float(sum(not entry["connected"] for entry in state["workers"]))

            await until_async(lost, 1, seconds=60)
            again(signal.SIGCONT)

        async def move(name: str) -> None:
            """A second SIGTERM during a drain: the streams go elsewhere at once."""
            child = workers[name].process.child
            assert child is not None
            child.send_signal(signal.SIGTERM)

            async def draining() -> float:
                return float((await workers[name].state())["draining"])

            await until_async(draining, 1, seconds=60)
            child.send_signal(signal.SIGTERM)
            assert await child.wait() == 0
            await workers[name].restart()

        async def kill_router() -> None:
            await fleet.routers[0].stop()
            await fleet.routers[0].start()

        expected = await answers(fleet)
        assert all(finish == "length" for _, finish in expected)
        blows: dict[str, tuple[Callable[[], Awaitable[None]], int]] = {
            "a prefill and a decode worker die": (lambda: kill("p0", "d0"), 0),
            "every decode worker dies": (lambda: kill("d0", "d1"), 0),
            "every prefill worker dies": (lambda: kill("p0", "p1"), 0),
            "a decode worker's core dies": (lambda: kill_core("d1"), 0),
            "a decode worker freezes": (lambda: freeze("d0"), 0),
            "a prefill worker freezes": (lambda: freeze("p0"), 0),
            "a drain is hurried": (lambda: move("d1"), 0),
            "a router dies": (kill_router, 20),
        }
        for name, (blow, retries) in blows.items():
            assert await answers(fleet, blow, retries) == expected, name
            await fleet.settle()
