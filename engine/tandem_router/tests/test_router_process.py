"""Real processes: a router in front of mock workers, killed and drained on purpose."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
from deadlines import patience

from tandem_router.config import RouterConfig
from tandem_router.main import configure_logging, serve
from tandem_router.tests.fake_worker import FakeWorker
from tandem_router.tests.harness import until
from tandem_router.text.loading import load_text_model

PROMPT = "Once upon a time there was a prompt of some length. " * 10


# Below the range from which the kernel takes ports for outgoing connections: a killed worker
# must find its port free when it starts again. Each test process begins elsewhere.
FIRST_PORT, NUM_PORTS = 20000, 12000
_candidates = itertools.count(os.getpid() * 997)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody else is handed or takes by chance."""
    for candidate in _candidates:
        port = FIRST_PORT + candidate % NUM_PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("not reached")


class Process:
    """One of our console scripts; its log goes to a file."""

    def __init__(self, log: Path, module: str, *flags: str, **env: str) -> None:
        self.log, self.module, self.flags, self.env = log, module, flags, env
        self.child: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self.module,
                *self.flags,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.env},
            )

    async def stop(self, number: int = signal.SIGKILL) -> int:
        assert self.child is not None
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(number)
        return await self.child.wait()


class Front:
    """A router's two addresses on free ports: of clients, and of whoever looks into it."""

    def __init__(self) -> None:
        ports = free_port(), free_port()
        self.url, self.monitor = (f"http://127.0.0.1:{port}" for port in ports)
        self.flags = ("--port", str(ports[0]), "--metrics-port", str(ports[1]))


def worker(path: Path, name: str, role: str, port: int, profile: str) -> Process:
    return Process(
        path / f"{name}.log",
        "tandem_engine.main",
        *("--mock", profile, "--served-model-name", "mock", "--role", role),
        *("--host", "127.0.0.1", "--http-port", "0", "--wire-port", str(port)),
        *("--bootstrap-port", "0", "--local-prefill-tokens", "0"),
        POD_NAME=name,
        POD_IP="127.0.0.1",
    )


@contextlib.asynccontextmanager
async def fleet(
    path: Path, profile: str = "tiny", policy: str = "LeastLoaded"
) -> AsyncIterator[tuple[Front, dict[str, Process]]]:
    """p0, d0 and d1 behind a router; yields its addresses and the workers."""
    ports = {name: free_port() for name in ("p0", "d0", "d1")}
    roles = {"p": "prefill", "d": "decode"}
    workers = {
        name: worker(path, name, roles[name[0]], port, profile) for name, port in ports.items()
    }
    front = Front()
    flags = [flag for at in ports.values() for flag in ("--worker", f"127.0.0.1:{at}")]
    process = Process(
        path / "router.log",
        "tandem_router.main",
        *("--model", "mock://tiny", "--model-name", "mock", "--host", "127.0.0.1"),
        *(*front.flags, "--log-level", "debug", "--policy", policy),
        *flags,
    )
    try:
        for each in (*workers.values(), process):
            await each.start()
        await until_connected(front.monitor, 3)
        yield front, workers
        assert await process.stop(signal.SIGTERM) == 0
    finally:
        for each in (process, *workers.values()):
            if each.child is not None and each.child.returncode is None:
                await each.stop()


async def until_connected(monitor: str, count: int) -> None:
    async def connected() -> int:
        try:
            async with httpx.AsyncClient() as client:
                state = (await client.get(f"{monitor}/state")).json()
        except httpx.TransportError:
            return 0
        return sum(entry["connected"] for entry in state["workers"])

    await until_async(connected, count, seconds=90)


@pytest.mark.slow
async def test_killed_workers_are_only_pauses(tmp_path: Path) -> None:
    """kill -9 of a decode worker, then of the prefill worker: the same tokens as undisturbed."""
    profile = "tiny?decode_base=0.01"
    async with (
        fleet(tmp_path, profile) as (front, workers),
        openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as client,
    ):

        async def ask(seed: int) -> tuple[str, dict[str, object]]:
            stream = await client.completions.create(
                model="mock",
                prompt=f"{seed} {PROMPT}",
                max_tokens=300,
                seed=seed,
                stream=True,
                stream_options={"include_usage": True},
            )
            text = ""
            facts: dict[str, object] = {}
            async for chunk in stream:
                text += chunk.choices[0].text if chunk.choices else ""
                facts = (chunk.model_extra or {}).get("tandem") or facts
            return text, facts

        expected = await asyncio.gather(*(ask(seed) for seed in range(12)))
        assert {facts["prefill_worker"] for _, facts in expected} == {"p0"}
        assert all(int(str(facts["kv_bytes"])) > 0 for _, facts in expected)
        for victim in ("d0", "p0"):
            requests = [asyncio.create_task(ask(seed)) for seed in range(12)]
            await until_streaming(front.monitor)
            await workers[victim].stop()
            answers = await asyncio.gather(*requests)
            assert [text for text, _ in answers] == [text for text, _ in expected]
            if victim == "d0":
                assert sum(int(str(facts["failovers"])) for _, facts in answers) > 0
            await workers[victim].start()
            await until_connected(front.monitor, 3)


async def until_streaming(monitor: str) -> None:
    """Some output tokens are on their way for the running requests."""

    async def inflight() -> float:
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"{monitor}/metrics")).text
        line = next(entry for entry in text.splitlines() if entry.startswith("tandem_inflight{"))
        return float(line.split()[-1])

    await until_async(inflight, 8, seconds=30)


async def until_async(
    measure: Callable[[], Awaitable[float]], least: float, *, seconds: float
) -> None:
    deadline = time.monotonic() + patience(seconds)
    while (value := await measure()) < least:
        assert time.monotonic() < deadline, f"still {value} < {least}"
        await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_a_drained_worker_moves_or_finishes_its_streams(tmp_path: Path) -> None:
    async with (
        fleet(tmp_path, "tiny?decode_base=0.01") as (front, workers),
        httpx.AsyncClient(base_url=front.url, timeout=patience(60)) as client,
    ):
        body = {"model": "mock", "prompt": PROMPT, "max_tokens": 100, "seed": 1}
        expected = (await client.post("/v1/completions", json=body)).json()["choices"]
        requests = [
            asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(10)
        ]
        await until_streaming(front.monitor)
        stopping = asyncio.create_task(workers["d1"].stop(signal.SIGTERM))
        answers = await asyncio.gather(*requests)
        assert all(answer.json()["choices"] == expected for answer in answers)
        assert await stopping == 0


@pytest.mark.slow
async def test_kv_aware_finds_the_worker_that_holds_the_prefix(tmp_path: Path) -> None:
    """The router computes the very hashes that real workers report."""
    async with (
        fleet(tmp_path, policy="KvAware") as (front, _),
        httpx.AsyncClient(base_url=front.url, timeout=patience(60)) as client,
        httpx.AsyncClient(base_url=front.monitor, timeout=patience(60)) as monitor,
    ):

        async def ask(prompt: str) -> tuple[str, int]:
            body = {"model": "mock", "prompt": prompt, "max_tokens": 3, "seed": 1}
            answer = (await client.post("/v1/completions", json=body)).json()
            details = answer["usage"]["prompt_tokens_details"]
            return answer["tandem"]["decode_worker"], details["cached_tokens"]

        for number in range(4):
            prompt = f"{number} {PROMPT}"
            before = await blocks(monitor)
            first, _ = await ask(prompt)
            told = before.get(first, 0) + 7  # no block of an earlier prompt is one of this one's
            await until_async(partial(blocks_of, monitor, first), told, seconds=20)
            for _ in range(4):
                again, cached = await ask(prompt)
                assert again == first
                assert cached >= 448


async def blocks(monitor: httpx.AsyncClient) -> dict[str, int]:
    entries = (await monitor.get("/state")).json()["workers"]
    return {entry["worker_id"]: entry["prefix_blocks"] for entry in entries}


async def blocks_of(monitor: httpx.AsyncClient, worker: str) -> float:
    return (await blocks(monitor))[worker]


async def readiness(client: httpx.AsyncClient) -> float:
    return (await client.get("/ready")).status_code


async def test_sigterm_finishes_streams_then_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of `serve` in this process, so that its own lines are measured too."""
    fake = await FakeWorker(step_seconds=0.005).start()
    port, metrics_port = free_port(), free_port()
    config = RouterConfig(
        model_name="mock",
        model="mock://tiny",
        host="127.0.0.1",
        port=port,
        metrics_port=metrics_port,
        workers=(fake.address,),
        drain_seconds=30,
        linger_seconds=1.0,
    )
    serving = asyncio.create_task(serve(config, load_text_model(config.model)))
    url = f"http://127.0.0.1:{port}"
    await until_connected(f"http://127.0.0.1:{metrics_port}", 1)
    async with httpx.AsyncClient(base_url=url, timeout=patience(60)) as client:
        body = {"model": "mock", "prompt": "x", "max_tokens": 60, "seed": 0}
        request = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: fake.submits)
        os.kill(os.getpid(), signal.SIGTERM)
        await until_async(lambda: readiness(client), 503, seconds=20)
        late = await client.post("/v1/completions", json={**body, "max_tokens": 2})
        assert late.status_code == 200, "it lingers while clients still find it"
        answer = await request
        assert len(answer.json()["choices"][0]["text"]) == 60
    await asyncio.wait_for(serving, patience(30))
    await fake.die()


def test_logs_are_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    import structlog

    before = structlog.get_config()
    try:
        configure_logging("info", access_log=False)
        structlog.get_logger("part").info("hello", value={1, 2}, worker="d0")
        structlog.get_logger("part").debug("not shown")
        structlog.get_logger("access").info("request", status=200)
        (line,) = capsys.readouterr().out.splitlines()
        entry = json.loads(line)
        assert (entry["event"], entry["worker"], entry["level"]) == ("hello", "d0", "info")
    finally:
        structlog.configure(**before)
