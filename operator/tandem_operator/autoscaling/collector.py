"""Reads the metrics of live routers and workers and makes `Signals` of them.

Readings are kept per pod (by uid), so a pod that has gone takes its last values with it, and a new
one starts without a past.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tandem_operator.autoscaling.histogram import (
    Scrape,
    bucket_growth,
    growth,
    merge_buckets,
    parse,
    quantile,
)
from tandem_operator.autoscaling.signals import DecodeSignals, PrefillSignals, Signals

WINDOW_SECONDS = 30.0
SCRAPE_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True)
class Endpoint:
    """A pod to read: its uid and base URL."""

    uid: str
    url: str


@dataclass
class Collector:
    """The recent past of one service."""

    client: httpx.AsyncClient
    clock: Callable[[], float] = time.monotonic
    window_seconds: float = WINDOW_SECONDS
    _routers: dict[str, deque[Scrape]] = field(default_factory=dict)
    _complete_at: float | None = None
    _busy_at: float | None = None

    async def read(
        self,
        routers: Iterable[Endpoint],
        prefill: Iterable[Endpoint],
        decode: Iterable[Endpoint],
        percentile: int,
    ) -> Signals:
        """Scrape everything once. A reading counts as complete when every pod answered."""
        routers, prefill, decode = list(routers), list(prefill), list(decode)
        pages, states = await asyncio.gather(
            asyncio.gather(*(self._metrics(router) for router in routers)),
            asyncio.gather(*(self._state(worker) for worker in [*prefill, *decode])),
        )
        now = self.clock()
        self._remember(routers, pages, now)
        answered = bool(routers) and None not in pages and None not in states
        if answered:
            self._complete_at = now
        age = float("inf") if self._complete_at is None else now - self._complete_at
        if not answered:
            return Signals(age_seconds=age)
        known = [state for state in states if state is not None]
        return self._signals(
            known[: len(prefill)], known[len(prefill) :], percentile, age_seconds=age, now=now
        )

    async def _metrics(self, router: Endpoint) -> Scrape | None:
        try:
            reply = await self.client.get(f"{router.url}/metrics", timeout=SCRAPE_TIMEOUT_SECONDS)
            reply.raise_for_status()
            return parse(reply.text, self.clock())
        except (httpx.HTTPError, ValueError):
            return None

    async def _state(self, worker: Endpoint) -> dict[str, Any] | None:
        try:
            reply = await self.client.get(f"{worker.url}/state", timeout=SCRAPE_TIMEOUT_SECONDS)
            reply.raise_for_status()
            state: dict[str, Any] = reply.json()
            return state
        except (httpx.HTTPError, ValueError):
            return None

    def _remember(
        self, routers: list[Endpoint], pages: Iterable[Scrape | None], now: float
    ) -> None:
        live = {router.uid for router in routers}
        self._routers = {uid: past for uid, past in self._routers.items() if uid in live}
        for router, page in zip(routers, pages, strict=True):
            past = self._routers.setdefault(router.uid, deque())
            if page is not None:
                past.append(page)
            while len(past) > 2 and past[1].at < now - self.window_seconds:
                past.popleft()

    def _spans(self) -> list[tuple[Scrape, Scrape]]:
        return [(past[0], past[-1]) for past in self._routers.values() if len(past) > 1]

    def _signals(
        self,
        prefill: list[dict[str, Any]],
        decode: list[dict[str, Any]],
        percentile: int,
        age_seconds: float,
        now: float,
    ) -> Signals:
        spans = self._spans()
        seconds = max((last.at - first.at for first, last in spans), default=0.0)

        def rate(name: str) -> float:
            total = sum(growth(name, first, last) for first, last in spans)
            return total / seconds if seconds > 0 else 0.0

        def latency(name: str) -> float | None:
            grown = (bucket_growth(name, first, last) for first, last in spans)
            return quantile(merge_buckets(grown), percentile)

        inflight = sum(
            past[-1].totals.get("tandem_inflight", 0.0) for past in self._routers.values() if past
        )
        requests = rate("tandem_requests_total")
        if requests > 0 or inflight > 0 or self._busy_at is None:
            self._busy_at = now
        return Signals(
            age_seconds=age_seconds,
            requests_per_second=requests,
            num_inflight=int(inflight),
            idle_seconds=now - self._busy_at,
            prefill=_prefill_signals(
                prefill,
                latency("tandem_ttft_seconds"),
                rate('tandem_prompt_tokens_total{cached="false"}'),
            ),
            decode=_decode_signals(decode, latency("tandem_tbt_seconds")),
        )


def _prefill_signals(
    states: list[dict[str, Any]], ttft: float | None, uncached_per_second: float
) -> PrefillSignals:
    speeds = [speed for s in states if (speed := s["load"]["prefill_tokens_per_second"]) > 0]
    velocity = sum(speeds) / len(speeds) if speeds else 0.0
    return PrefillSignals(
        ttft_seconds=ttft,
        queued_seconds=sum(s["load"]["queued_prompt_seconds"] for s in states),
        busy_workers=uncached_per_second / velocity if velocity else 0.0,
    )


def _decode_signals(states: list[dict[str, Any]], tbt: float | None) -> DecodeSignals:
    usage = [
        1 - s["load"]["num_free_blocks"] / s["load"]["num_blocks"]
        for s in states
        if s["load"]["num_blocks"]
    ]
    return DecodeSignals(
        tbt_seconds=tbt,
        kv_usage=sum(usage) / len(usage) if usage else 0.0,
        max_kv_usage=max(usage, default=0.0),
        num_running=sum(s["load"]["num_running"] for s in states),
        num_waiting=sum(s["load"]["num_waiting"] for s in states),
    )
