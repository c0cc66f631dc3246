"""Reads the metrics of live routers and workers and makes `Signals` of them.

Readings are kept per pod (by uid), so a pod that has gone takes its last values with it, and a new
one starts without a past.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

import httpx

from tandem_operator.facts.signals import WINDOW_SECONDS, DecodeSignals, PrefillSignals, Signals
from tandem_operator.observe.histogram import (
    Scrape,
    bucket_growth,
    growth,
    merge_buckets,
    parse,
    quantile,
)

SCRAPE_TIMEOUT_SECONDS: Final = 2.0
LOAD_FIELDS: Final = (
    "prefill_tokens_per_second",
    "queued_prompt_seconds",
    "num_free_blocks",
    "num_blocks",
    "num_running",
    "num_waiting",
)


@dataclass(frozen=True)
class Endpoint:
    """A pod to read: its uid and base URL."""

    uid: str
    url: str


@dataclass(frozen=True)
class _Worker:
    """One answer of a worker's /state: its load, and prompt tokens computed since it started."""

    at: float
    load: dict[str, float]
    num_prefilled: float


R = TypeVar("R", Scrape, _Worker)


@dataclass
class Collector:
    """The recent past of one service."""

    client: httpx.AsyncClient
    clock: Callable[[], float] = time.monotonic
    window_seconds: float = WINDOW_SECONDS
    _routers: dict[str, deque[Scrape]] = field(default_factory=dict)
    _workers: dict[str, deque[_Worker]] = field(default_factory=dict)
    _complete_at: float | None = None
    _unbroken_since: float | None = None
    _busy_at: float | None = None
    _last: Signals = field(default_factory=Signals)

    async def read(
        self,
        routers: Iterable[Endpoint],
        prefill: Iterable[Endpoint],
        decode: Iterable[Endpoint],
        percentile: int,
        slo_class: str = "",
    ) -> Signals:
        """Scrape everything once. A reading counts as complete when every pod answered.

        Latencies are those of `slo_class`, or of all requests when it is empty.
        """
        routers, prefill, decode = list(routers), list(prefill), list(decode)
        pages, states = await asyncio.gather(
            asyncio.gather(*(self._metrics(router) for router in routers)),
            asyncio.gather(*(self._state(worker) for worker in [*prefill, *decode])),
        )
        now = self.clock()
        self._routers = _remember(self._routers, routers, pages, now - self.window_seconds)
        self._workers = _remember(
            self._workers, [*prefill, *decode], states, now - self.window_seconds
        )
        answered = bool(routers) and None not in pages and None not in states
        if not answered:
            age = float("inf") if self._complete_at is None else now - self._complete_at
            if age > self.window_seconds:
                self._unbroken_since = None
            return replace(self._last, age_seconds=age)
        self._complete_at = now
        if self._unbroken_since is None:
            self._unbroken_since = now
        self._last = self._signals(prefill, decode, percentile, slo_class, now)
        return self._last

    async def _metrics(self, router: Endpoint) -> Scrape | None:
        try:
            reply = await self.client.get(f"{router.url}/metrics", timeout=SCRAPE_TIMEOUT_SECONDS)
            reply.raise_for_status()
            return parse(reply.text, self.clock())
        except (httpx.HTTPError, ValueError):
            return None

    async def _state(self, worker: Endpoint) -> _Worker | None:
        try:
            reply = await self.client.get(f"{worker.url}/state", timeout=SCRAPE_TIMEOUT_SECONDS)
            reply.raise_for_status()
            state = reply.json()
            prefilled = float(state["counters"].get("prefill_tokens_total", 0.0))
            return _Worker(
                self.clock(), {name: float(state["load"][name]) for name in LOAD_FIELDS}, prefilled
            )
        except (httpx.HTTPError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def _signals(
        self,
        prefill: list[Endpoint],
        decode: list[Endpoint],
        percentile: int,
        slo_class: str,
        now: float,
    ) -> Signals:
        spans = [(past[0], past[-1]) for past in self._routers.values() if len(past) > 1]
        seconds = max((last.at - first.at for first, last in spans), default=0.0)
        of_class = {"class": slo_class} if slo_class else {}

        def latency(name: str) -> float | None:
            grown = (bucket_growth(name, first, last, **of_class) for first, last in spans)
            return quantile(merge_buckets(grown), percentile)

        inflight = sum(past[-1].total("tandem_inflight") for past in self._routers.values() if past)
        requests = sum(growth("tandem_requests_total", first, last) for first, last in spans)
        if requests > 0 or inflight > 0 or self._busy_at is None:
            self._busy_at = now
        since = now if self._unbroken_since is None else self._unbroken_since
        return Signals(
            age_seconds=0.0,
            settled=now - since >= self.window_seconds,
            requests_per_second=requests / seconds if seconds > 0 else 0.0,
            num_inflight=int(inflight),
            idle_seconds=now - self._busy_at,
            attained_percent=_attained(spans, of_class),
            prefill=_prefill_signals(
                [self._workers[worker.uid] for worker in prefill], latency("tandem_ttft_seconds")
            ),
            decode=_decode_signals(
                [self._workers[worker.uid] for worker in decode], latency("tandem_tbt_seconds")
            ),
        )


def _remember(
    past: dict[str, deque[R]],
    pods: list[Endpoint],
    readings: Iterable[R | None],
    start: float,
) -> dict[str, deque[R]]:
    """The past of pods that live with the new readings, back to the last before `start`."""
    kept = {pod.uid: past.get(pod.uid, deque()) for pod in pods}
    for pod, reading in zip(pods, readings, strict=True):
        of_pod = kept[pod.uid]
        if reading is not None:
            of_pod.append(reading)
        while len(of_pod) > 2 and of_pod[1].at < start:
            of_pod.popleft()
    return kept


def _attained(spans: list[tuple[Scrape, Scrape]], labels: dict[str, str]) -> float | None:
    """The lower of both objectives' shares: counters don't tell which sequences kept both."""
    shares = []
    for objective in ("ttft", "tbt"):
        kept, missed = (
            sum(growth(name, first, last, objective=objective, **labels) for first, last in spans)
            for name in ("tandem_slo_attained_total", "tandem_slo_missed_total")
        )
        if kept + missed > 0:
            shares.append(100 * kept / (kept + missed))
    return min(shares, default=None)


def _prefill_signals(workers: list[deque[_Worker]], ttft: float | None) -> PrefillSignals:
    loads = [past[-1].load for past in workers]
    speeds = [speed for load in loads if (speed := load["prefill_tokens_per_second"]) > 0]
    velocity = sum(speeds) / len(speeds) if speeds else 0.0
    computed = 0.0
    for past in workers:
        first, last = past[0], past[-1]
        if last.at > first.at:
            computed += max(last.num_prefilled - first.num_prefilled, 0.0) / (last.at - first.at)
    return PrefillSignals(
        ttft_seconds=ttft,
        queued_seconds=sum(load["queued_prompt_seconds"] for load in loads),
        peak_queued_seconds=sum(_peak(past, "queued_prompt_seconds") for past in workers),
        busy_workers=computed / velocity if velocity else 0.0,
    )


def _decode_signals(workers: list[deque[_Worker]], tbt: float | None) -> DecodeSignals:
    loads = [past[-1].load for past in workers]
    usage = [
        1 - load["num_free_blocks"] / load["num_blocks"] for load in loads if load["num_blocks"]
    ]
    return DecodeSignals(
        tbt_seconds=tbt,
        kv_usage=sum(usage) / len(usage) if usage else 0.0,
        max_kv_usage=max(usage, default=0.0),
        num_running=int(sum(load["num_running"] for load in loads)),
        num_waiting=int(sum(load["num_waiting"] for load in loads)),
        peak_running=int(max((_peak(past, "num_running") for past in workers), default=0)),
    )


def _peak(past: deque[_Worker], name: str) -> float:
    return max(reading.load[name] for reading in past)
