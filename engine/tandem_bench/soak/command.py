"""Thousands of requests while workers lose, change and repeat messages, and are killed.

Fails unless every answer is right or a typed refusal, and nothing is held when all is over. The
same seed gives the same questions, faults and blows; what they meet depends on the clock.
"""

import asyncio
import json
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import httpx
import msgspec

from tandem_bench.errors import CheckFailedError
from tandem_bench.options import json_option, option
from tandem_bench.soak.answers import Book, HeardBook, MockBook, Question, Seen, ask
from tandem_bench.soak.fleet import Blow, Fleet, WorkerSetting
from tandem_bench.terminal import notes, results
from tandem_engine.faults import Fault, Step

MOCK: Final = "mock://tiny?decode_ms=2&prefill_ms=2"
LOOK_SECONDS: Final = 1.0
SETTLE_SECONDS: Final = 60.0
NUM_HEARD: Final = 60
DELAY: Final = "0.3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Thousands of requests while workers lose, change and repeat messages, and are killed."""

    requests: int = option(20_000, "How many.", minimum=1)
    model: str = option(MOCK, "Any model; the mock's answers are known beforehand.")
    vocab: int = option(256, "Token ids of a real model's prompts are below this.", minimum=2)
    seed: int = option(7, "Of questions, faults and blows.")
    prefill: int = option(2, "Prefill workers.", minimum=1)
    decode: int = option(2, "Decode workers.", minimum=1)
    concurrency: int = option(48, "Requests at a time.", minimum=1)
    max_prompt: int = option(400, "Longest prompt, in tokens.", minimum=1)
    max_output: int = option(24, "Longest answer, in tokens.", minimum=1)
    transfer: str = option("Auto", "Transport of KV.")
    lease_seconds: float = option(2.0, "Lease; a stall is given up after twice as long.")
    per_mille: float = option(2.0, "How often each fault comes at each step, in 1/1000.")
    faults: str = option("", "TANDEM_FAULTS of all workers, instead of every fault.")
    blow_seconds: float = option(10.0, "Mean time between blows (SIGKILL, SIGSTOP); 0: none.")
    json_file: Path | None = json_option()


@dataclass
class Report:
    """What a soak came to. All but the first four lists must be empty or zero."""

    seconds: float = 0.0
    seen: Seen = field(default_factory=Seen)
    blows: Counter[str] = field(default_factory=Counter)
    faults: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    num_starts: int = 0
    bugs: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)

    def failures(self) -> list[str]:
        """Everything that must not be."""
        return [*self.seen.wrong, *self.seen.errors, *self.bugs, *self.held]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found | {"failures": self.failures()}


def every_fault(per_mille: float, seed: int) -> str:
    """Every fault at every step; a kill is much rarer, since every life takes seconds to begin."""
    share = per_mille / 1000
    clauses = []
    for step in get_args(Step):
        for fault in get_args(Fault):
            value = f"={DELAY}" if fault == "delay" else ""
            rate = share / 20 if fault == "kill" else share
            clauses.append(f"{step}:{fault}{value}@{rate:.6g}")
    return f"{','.join(clauses)};seed={seed}"


async def soak(options: Options, folder: Path) -> Report:
    """Ask, disturb, wait until it is quiet, and look at what is left. Logs go to `folder`."""
    setting = WorkerSetting(
        model=options.model,
        transfer=options.transfer,
        lease_seconds=options.lease_seconds,
        faults=options.faults or every_fault(options.per_mille, options.seed),
        folder=folder,
    )
    report = Report()
    book = await _find_book(options, setting)
    async with Fleet(setting, options.prefill, options.decode) as fleet:
        started = time.monotonic()
        looking = asyncio.create_task(_look(fleet))
        striking = asyncio.create_task(_strike(fleet, options, report.blows))
        try:
            await _ask_all(fleet.url, options, book, report.seen)
        finally:
            striking.cancel()
            await asyncio.wait([striking])
        report.seconds = time.monotonic() - started
        report.held = await _find_held(fleet, options)
        looking.cancel()
        await asyncio.wait([looking])
        totals = fleet.totals()
        report.faults = {
            key: value for key, value in sorted(totals.items()) if "faults_injected" in key
        }
        report.counters = {
            key: value for key, value in sorted(totals.items()) if key.startswith("kv_")
        }
        report.num_starts = sum(worker.num_starts for worker in fleet.workers)
        report.bugs = fleet.bugs()
    return report


async def _find_book(options: Options, setting: WorkerSetting) -> Book:
    invented = MockBook(options.seed, options.max_prompt, options.max_output)
    if options.model.startswith("mock://"):
        return invented
    questions = [
        Question(each.number, tuple(t % options.vocab for t in each.prompt), each.num_tokens)
        for each in map(invented.question, range(min(NUM_HEARD, options.requests)))
    ]
    calm = WorkerSetting(
        model=setting.model,
        transfer=setting.transfer,
        lease_seconds=60.0,
        faults="",
        folder=setting.folder / "calm",
    )
    answers: list[list[int]] = []
    async with Fleet(calm, 0, 1) as fleet, httpx.AsyncClient(timeout=600.0) as client:
        for question in questions:
            body = question.body() | {"stream": False}
            reply = await client.post(f"{fleet.url}/v1/completions", json=body)
            answers.append(reply.json()["choices"][0]["token_ids"])
    return HeardBook(questions, answers)


async def _ask_all(url: str, options: Options, book: Book, seen: Seen) -> None:
    numbers = iter(range(options.requests))
    limits = httpx.Limits(max_connections=options.concurrency)

    async def ask_on(client: httpx.AsyncClient) -> None:
        for number in numbers:
            await ask(client, url, book.question(number), book, seen)
            if number % 1000 == 999:
                notes.print(f"{seen.num_answered} answered, {len(seen.errors)} errors")

    async with httpx.AsyncClient(limits=limits, timeout=600.0) as client:
        await asyncio.gather(*(ask_on(client) for _ in range(options.concurrency)))


async def _look(fleet: Fleet) -> None:
    async with httpx.AsyncClient(timeout=2.0) as client:
        while True:
            await asyncio.gather(*(worker.look(client) for worker in fleet.workers))
            await asyncio.sleep(LOOK_SECONDS)


async def _strike(fleet: Fleet, options: Options, blows: Counter[str]) -> None:
    rng = random.Random(options.seed)
    kinds: tuple[Blow, ...] = get_args(Blow)
    while options.blow_seconds:
        await asyncio.sleep(rng.uniform(0.5, 1.5) * options.blow_seconds)
        worker, blow = rng.choice(fleet.workers), rng.choice(kinds)
        if await worker.strike(blow, 2 * options.lease_seconds):
            blows[f"{worker.role} {blow}"] += 1


async def _find_held(fleet: Fleet, options: Options) -> list[str]:
    """What any worker holds after twice the lease time, as its own dump says."""
    await asyncio.sleep(2 * options.lease_seconds)
    headers = {"Authorization": f"Bearer {fleet.token}"}
    async with httpx.AsyncClient(timeout=10.0, headers=headers) as client:
        looks: list[Awaitable[list[str]]] = [
            _dump(client, worker.name, worker.url) for worker in fleet.workers
        ]
        return [line for lines in await asyncio.gather(*looks) for line in lines]


async def _dump(client: httpx.AsyncClient, name: str, url: str) -> list[str]:
    """What one worker holds. One that was killed a moment ago is waited for."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            reply = await client.get(f"{url}/admin/leases")
            if reply.status_code == 200:
                break
            trouble = reply.text
        except httpx.HTTPError as error:
            trouble = str(error) or type(error).__name__
        if time.monotonic() > end:
            return [f"{name} can't say what it holds: {trouble}"]
        await asyncio.sleep(LOOK_SECONDS)
    found = reply.json()
    blocks = {use: found["blocks"][use] for use in ("owned", "leased", "leaked")}
    held = [f"{name}: {blocks}"] if any(blocks.values()) else []
    lists = ("requests", "fetches", "pushes")
    return held + [f"{name}: {entry}" for kind in lists for entry in found[kind]]


async def _run_to_the_end(options: Options, folder: Path) -> Report:
    """A soak whose processes end with it, also when it is told to stop."""
    task = asyncio.ensure_future(soak(options, folder))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def run(options: Options) -> None:
    """Run it, print what was seen, and fail unless all was well."""
    with tempfile.TemporaryDirectory(prefix="tandem-soak-") as folder:
        report = asyncio.run(_run_to_the_end(options, Path(folder)))
    seen = report.seen
    results.print(
        f"{seen.num_answered} requests in {report.seconds:.0f} s: {seen.num_right} right "
        f"({seen.num_moved} of them outlived a worker), {len(seen.wrong)} wrong, "
        f"{len(seen.errors)} errors, {seen.refused.total()} refused {dict(seen.refused)}"
    )
    num_faults = int(sum(report.faults.values()))
    results.print(
        f"{num_faults} faults, blows {dict(report.blows)}, {report.num_starts} starts of "
        f"{options.prefill + options.decode} workers; longest gap {seen.longest_gap:.1f} s"
    )
    fetches = {key: int(value) for key, value in report.counters.items() if "fetches" in key}
    results.print(f"{fetches}; held afterwards: {report.held or 'nothing'}")
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(report.as_json(), indent=1))
    failures = report.failures()
    if failures:
        raise CheckFailedError(
            f"{len(failures)} things that must not be: {'; '.join(failures[:10])}",
            f"run it again with --seed {options.seed}",
        )
