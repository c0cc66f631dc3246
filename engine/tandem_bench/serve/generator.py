"""The load generator: an open loop never waits for answers.

A request is due at its own time whatever happened to the ones before it. How late it was really
sent, and how long the event loop was busy with something else, are measured: a figure is only worth
something while both are small against what is measured.
"""

import asyncio
import contextlib
import gc
import itertools
import resource
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from tandem_bench.errors import WorkloadError
from tandem_bench.record import RequestRecord, RunResult, clock
from tandem_bench.serve.endpoint import Endpoint
from tandem_bench.workload.planned import PlannedRequest
from tandem_bench.workload.prompts import PromptMaker

PULSE_SECONDS: Final = 0.02
"""Interval at which the event loop's own delay is taken."""
PROGRESS_SECONDS: Final = 0.5
LATE_BURST: Final = 8
"""How many overdue requests are sent at a time."""


@dataclass(slots=True)
class Counters:
    """For a progress bar."""

    sent: int = 0
    finished: int = 0
    failed: int = 0
    pieces: int = 0
    elapsed: float = 0.0

    @property
    def in_flight(self) -> int:
        """Sent and not ended."""
        return self.sent - self.finished


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How a run is driven, whatever is sent."""

    concurrency: int = 0  # closed loop with this many requests in flight; 0: open loop
    num_requests: int = 0  # stop after this many; 0: only the duration counts
    duration: float = 0.0  # seconds after which nothing more is sent; 0: only the number counts
    warmup: int = 0  # requests sent first, one after the other, and not counted
    warmup_tokens: tuple[int, int] = (64, 8)  # prompt and answer of a warm-up request
    extra: dict[str, Any] = field(default_factory=dict)  # goes with every request

    def check(self) -> None:
        """Raise WorkloadError for what would never end or never begin."""
        for flag, value in (
            ("--num-requests", self.num_requests),
            ("--duration", self.duration),
            ("--concurrency", self.concurrency),
            ("--warmup", self.warmup),
        ):
            if value < 0:
                raise WorkloadError(f"{flag} is {value}", "give 0 or more")


class LoadGenerator:
    """Sends one workload to one endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        prompts: PromptMaker,
        settings: LoadSettings,
        on_progress: Callable[[Counters], None] = lambda _: None,
    ) -> None:
        settings.check()
        self._endpoint = endpoint
        self._prompts = prompts
        self._settings = settings
        self._on_progress = on_progress
        self._counters = Counters()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Send nothing more and give up on what is under way; `run` then returns."""
        self._stop.set()

    async def warm_up(self) -> None:
        """Open connections and give the endpoint time to compile; nothing is counted."""
        num_input, num_output = self._settings.warmup_tokens
        for number in range(self._settings.warmup):
            if self._stop.is_set():
                return
            prompt = self._prompts.warmup(number, num_input)
            body = self._endpoint.body(prompt, num_output, self._settings.extra)
            record = RequestRecord(-1, 0.0, requested_output=num_output)
            await self._endpoint.stream(body, record, clock())

    async def run(self, workload: Iterator[PlannedRequest]) -> RunResult:
        """Send the workload (bounded by the settings), wait for every answer."""
        settings, result = self._settings, RunResult()
        if settings.num_requests:
            workload = itertools.islice(workload, settings.num_requests)
        raise_file_limit()
        gc.collect()
        gc.freeze()
        start, cpu = clock(), time.process_time()
        pulse = asyncio.create_task(self._pulse(start, result.pulses))
        try:
            if settings.concurrency:
                await self._closed(workload, start, result.records)
            else:
                await self._open(workload, start, result.records)
            await self._finish(result)
        finally:
            pulse.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pulse
            gc.unfreeze()
        result.seconds, result.cpu_seconds = clock() - start, time.process_time() - cpu
        self._report(result.seconds)
        return result

    # --- the two loops ----------------------------------------------------------------------------

    async def _open(
        self, workload: Iterator[PlannedRequest], start: float, records: list[RequestRecord]
    ) -> None:
        duration, late = self._settings.duration, 0
        for planned in workload:
            if duration and planned.at >= duration:
                break
            record, body = self._prepare(planned)
            wait = planned.at - (clock() - start)
            if wait > 0:
                await self._sleep(wait)
                late = 0
            else:
                # Catch up, but give sent requests a turn: a turn of a busy loop takes milliseconds.
                late += 1
                if late % LATE_BURST == 0:
                    await asyncio.sleep(0)
            if self._stop.is_set():
                break
            record.scheduled = planned.at
            records.append(record)
            self._send(body, record, start)

    async def _closed(
        self, workload: Iterator[PlannedRequest], start: float, records: list[RequestRecord]
    ) -> None:
        settings = self._settings

        async def one_place() -> None:
            for planned in workload:
                now = clock() - start
                if self._stop.is_set() or (settings.duration and now >= settings.duration):
                    return
                record, body = self._prepare(planned)
                record.scheduled = clock() - start
                records.append(record)
                await self._send(body, record, start)

        places = {asyncio.create_task(one_place()) for _ in range(settings.concurrency)}
        await self._until_done(places)
        for place in places:
            place.cancel()
        for found in await asyncio.gather(*places, return_exceptions=True):
            if isinstance(found, Exception):
                raise found

    def _prepare(self, planned: PlannedRequest) -> tuple[RequestRecord, bytes]:
        record = RequestRecord(
            planned.number,
            planned.at,
            requested_input=planned.input_tokens,
            requested_output=planned.output_tokens,
        )
        prompt = self._prompts.prompt(planned)
        return record, self._endpoint.body(prompt, planned.output_tokens, self._settings.extra)

    def _send(self, body: bytes, record: RequestRecord, start: float) -> "asyncio.Task[None]":
        self._counters.sent += 1
        task = asyncio.create_task(self._one(body, record, start))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _one(self, body: bytes, record: RequestRecord, start: float) -> None:
        try:
            await self._endpoint.stream(body, record, start, self._count_pieces)
        except asyncio.CancelledError:
            record.error = "interrupted"
            raise
        finally:
            self._counters.finished += 1
            self._counters.failed += not record.ok

    def _count_pieces(self, pieces: int) -> None:
        self._counters.pieces += pieces

    async def _finish(self, result: RunResult) -> None:
        """Wait for what is under way, or cancel it when stopped."""
        tasks = set(self._tasks)
        await self._until_done(tasks)
        result.interrupted = self._stop.is_set()
        for task in tasks:
            task.cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(found, Exception):
                raise found
        for record in result.records:
            if record.ended != record.ended and not record.error:
                record.error = "interrupted"  # cancelled before it was sent

    async def _until_done(self, tasks: "set[asyncio.Task[None]]") -> None:
        """Until all of them have ended, or until stopped."""
        either = [
            asyncio.create_task(_until_set(self._stop)),
            asyncio.create_task(_until_ended(tasks)),
        ]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        for task in either:
            task.cancel()

    async def _sleep(self, seconds: float) -> None:
        """Until due, or until stopped."""
        if seconds < PULSE_SECONDS:
            await asyncio.sleep(seconds)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()

    async def _pulse(self, start: float, delays: "array[float]") -> None:
        shown = due = clock()
        while True:
            due = max(due + PULSE_SECONDS, clock())
            await asyncio.sleep(due - clock())
            now = clock()
            delays.append(max(0.0, now - due))
            if now - shown >= PROGRESS_SECONDS:
                shown = now
                self._report(now - start)

    def _report(self, elapsed: float) -> None:
        self._counters.elapsed = elapsed
        self._on_progress(self._counters)


async def _until_set(event: asyncio.Event) -> None:
    await event.wait()


async def _until_ended(tasks: "set[asyncio.Task[None]]") -> None:
    if tasks:
        await asyncio.wait(tasks)


def raise_file_limit() -> None:
    """An open loop may hold thousands of connections: take what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 20
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
