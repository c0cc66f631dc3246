"""Measures live routers and workers, and makes `Signals` of what they report.

Readings are kept per pod (by uid): a pod that is gone takes its last values with it, and a new pod
starts without a past.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from tandem_operator.clients.workers import SCRAPE_SECONDS, WorkerClient
from tandem_operator.facts.observed import PodAddress
from tandem_operator.facts.signals import (
    WINDOW_SECONDS,
    ClassSignals,
    DecodeSignals,
    PrefillSignals,
    Signals,
)
from tandem_operator.facts.worker import WorkerFigures
from tandem_operator.names import router
from tandem_operator.observe.histogram import (
    Scrape,
    bucket_growth,
    growth,
    merge_buckets,
    parse,
    quantile,
)
from tandem_operator.pair import Pair

Pods = Sequence[PodAddress]


@dataclass(frozen=True)
class Latency:
    """Which latencies to measure: a percentile, of one SLO class or (empty) of all requests."""

    percentile: int
    slo_class: str = ""


@dataclass(frozen=True)
class _Answer:
    """The figures in one answer of a worker's /state."""

    at: float
    figures: WorkerFigures


R = TypeVar("R", Scrape, _Answer)


@dataclass
class Collector:
    """The recent past of one service."""

    client: WorkerClient
    clock: Callable[[], float] = time.monotonic
    window_seconds: float = WINDOW_SECONDS
    _routers: dict[str, deque[Scrape]] = field(default_factory=dict)
    _workers: dict[str, deque[_Answer]] = field(default_factory=dict)
    _complete_at: float | None = None
    _unbroken_since: float | None = None
    _busy_at: float | None = None
    _last: Signals = field(default_factory=Signals)

    async def read(
        self,
        routers: Pods,
        workers: Pair[Pods],
        latency: Latency,
        classes: Sequence[Latency] = (),
    ) -> Signals:
        """Ask every pod once. A reading counts as complete when all of them answered.

        `latency` is what scaling follows, `classes` what is shown of each SLO class.
        """
        everyone = [*workers.prefill, *workers.decode]
        pages, answers = await asyncio.gather(
            asyncio.gather(*(self._scrape(pod) for pod in routers)),
            asyncio.gather(*(self._ask(pod) for pod in everyone)),
        )
        now = self.clock()
        start = now - self.window_seconds
        self._routers = _remember(self._routers, routers, pages, start)
        self._workers = _remember(self._workers, everyone, answers, start)
        wanted = self._is_wanted()
        if wanted:
            self._busy_at = now
        if not routers or None in pages or None in answers:
            age = float("inf") if self._complete_at is None else now - self._complete_at
            if age > self.window_seconds:
                self._unbroken_since = None
            return replace(self._last, age_seconds=age, wanted=wanted)
        self._complete_at = now
        if self._unbroken_since is None:
            self._unbroken_since = now
        self._last = replace(
            self._signals(workers, latency, now),
            classes=tuple(self._class_signals(of_class) for of_class in classes),
        )
        return self._last

    async def _scrape(self, pod: PodAddress) -> Scrape | None:
        text = await self.client.metrics(pod.ip, pod.port)
        if text is None:
            return None
        try:
            return parse(text, self.clock())
        except ValueError:
            return None

    async def _ask(self, pod: PodAddress) -> _Answer | None:
        state = await self.client.state(pod.ip, pod.port, SCRAPE_SECONDS)
        if state is None or state.figures is None:
            return None
        return _Answer(self.clock(), state.figures)

    @property
    def _spans(self) -> list[tuple[Scrape, Scrape]]:
        """The oldest and the newest page of each router that has two in the window."""
        return [(past[0], past[-1]) for past in self._routers.values() if len(past) > 1]

    def _is_wanted(self) -> bool:
        newest = (past[-1] for past in self._routers.values() if past)
        if any(page.total(router.METRIC_INFLIGHT) > 0 for page in newest):
            return True
        return any(growth(router.METRIC_REQUESTS, *span) > 0 for span in self._spans)

    def _signals(self, workers: Pair[Pods], wanted: Latency, now: float) -> Signals:
        spans = self._spans
        seconds = max((last.at - first.at for first, last in spans), default=0.0)
        measured = self._class_signals(wanted)
        inflight = sum(
            past[-1].total(router.METRIC_INFLIGHT) for past in self._routers.values() if past
        )
        requests = sum(growth(router.METRIC_REQUESTS, first, last) for first, last in spans)
        if self._busy_at is None:
            self._busy_at = now
        past = workers.map(lambda pods: [self._workers[pod.uid] for pod in pods])
        since = now if self._unbroken_since is None else self._unbroken_since
        return Signals(
            age_seconds=0.0,
            settled=now - since >= self.window_seconds,
            requests_per_second=requests / seconds if seconds > 0 else 0.0,
            num_inflight=int(inflight),
            idle_seconds=now - self._busy_at,
            attained_percent=measured.attained_percent,
            wanted=requests > 0 or inflight > 0,
            prefill=_prefill_signals(past.prefill, measured.ttft_seconds),
            decode=_decode_signals(past.decode, measured.tbt_seconds),
        )

    def _class_signals(self, wanted: Latency) -> ClassSignals:
        spans = self._spans
        of_class = {router.METRIC_LABEL_CLASS: wanted.slo_class} if wanted.slo_class else {}

        def latency(name: str) -> float | None:
            grown = (bucket_growth(name, first, last, **of_class) for first, last in spans)
            return quantile(merge_buckets(grown), wanted.percentile)

        return ClassSignals(
            name=wanted.slo_class,
            ttft_seconds=latency(router.METRIC_TTFT),
            tbt_seconds=latency(router.METRIC_TBT),
            attained_percent=_attained(spans, of_class),
        )


def _remember(
    past: dict[str, deque[R]],
    pods: Pods,
    readings: Iterable[R | None],
    start: float,
) -> dict[str, deque[R]]:
    """The past of live pods with the new readings, back to the last reading before `start`."""
    kept = {pod.uid: past.get(pod.uid, deque()) for pod in pods}
    for pod, reading in zip(pods, readings, strict=True):
        of_pod = kept[pod.uid]
        if reading is not None:
            of_pod.append(reading)
        while len(of_pod) > 2 and of_pod[1].at < start:
            of_pod.popleft()
    return kept


def _attained(spans: list[tuple[Scrape, Scrape]], labels: dict[str, str]) -> float | None:
    """The lower of both objectives' shares: counters don't show which sequences kept both."""
    shares = []
    for objective in router.OBJECTIVES:
        of_objective = {router.METRIC_LABEL_OBJECTIVE: objective}
        kept, missed = (
            sum(growth(name, first, last, **labels, **of_objective) for first, last in spans)
            for name in (router.METRIC_ATTAINED, router.METRIC_MISSED)
        )
        if kept + missed > 0:
            shares.append(100 * kept / (kept + missed))
    return min(shares, default=None)


def _prefill_signals(workers: list[deque[_Answer]], ttft: float | None) -> PrefillSignals:
    now = [past[-1].figures for past in workers]
    speeds = [speed for figures in now if (speed := figures.prefill_tokens_per_second) > 0]
    velocity = sum(speeds) / len(speeds) if speeds else 0.0
    computed = 0.0
    for past in workers:
        first, last = past[0], past[-1]
        if last.at > first.at:
            tokens = last.figures.num_prefilled - first.figures.num_prefilled
            computed += max(tokens, 0.0) / (last.at - first.at)
    return PrefillSignals(
        ttft_seconds=ttft,
        queued_seconds=sum(figures.queued_prompt_seconds for figures in now),
        peak_queued_seconds=sum(
            max(answer.figures.queued_prompt_seconds for answer in past) for past in workers
        ),
        busy_workers=computed / velocity if velocity else 0.0,
    )


def _decode_signals(workers: list[deque[_Answer]], tbt: float | None) -> DecodeSignals:
    now = [past[-1].figures for past in workers]
    usage = [
        1 - figures.num_free_blocks / figures.num_blocks for figures in now if figures.num_blocks
    ]
    peaks = (max(answer.figures.num_running for answer in past) for past in workers)
    return DecodeSignals(
        tbt_seconds=tbt,
        kv_usage=sum(usage) / len(usage) if usage else 0.0,
        max_kv_usage=max(usage, default=0.0),
        num_running=int(sum(figures.num_running for figures in now)),
        num_waiting=int(sum(figures.num_waiting for figures in now)),
        peak_running=int(max(peaks, default=0)),
    )
