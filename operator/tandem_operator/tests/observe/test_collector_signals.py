"""From metrics pages to signals: quantiles, restarts, dead pods, missing sources."""

from typing import Any

import httpx
import pytest

from tandem_operator.clients.workers import WorkerClient
from tandem_operator.facts.observed import PodAddress
from tandem_operator.observe.collector import Collector, Latency
from tandem_operator.observe.histogram import bucket_growth, growth, parse, quantile
from tandem_operator.pair import Pair

PAGE = """
# TYPE tandem_ttft_seconds histogram
tandem_ttft_seconds_bucket{{class="a",le="0.1"}} {fast}
tandem_ttft_seconds_bucket{{class="a",le="1.0"}} {all}
tandem_ttft_seconds_bucket{{class="a",le="+Inf"}} {all}
# TYPE tandem_requests_total counter
tandem_requests_total{{code="200",class="a"}} {all}
# TYPE tandem_slo_attained_total counter
tandem_slo_attained_total{{class="a",objective="ttft"}} {fast}
# TYPE tandem_slo_missed_total counter
tandem_slo_missed_total{{class="a",objective="ttft"}} {missed}
# TYPE tandem_inflight gauge
tandem_inflight {inflight}
"""

LOAD = {
    "prefill_tokens_per_second": 1000.0,
    "queued_prompt_seconds": 1.5,
    "num_free_blocks": 25,
    "num_blocks": 100,
    "num_running": 3,
    "num_waiting": 1,
}


def page(fast: int = 0, total: int = 0, inflight: int = 0) -> str:
    return PAGE.format(fast=fast, all=total, missed=total - fast, inflight=inflight)


def test_quantile_interpolates_inside_the_bucket() -> None:
    assert quantile({0.1: 50, 1.0: 100, float("inf"): 100}, 50) == pytest.approx(0.1)
    assert quantile({0.1: 50, 1.0: 100, float("inf"): 100}, 75) == pytest.approx(0.55)
    assert quantile({0.1: 0, float("inf"): 10}, 99) == pytest.approx(0.1)
    assert quantile({}, 50) is None
    assert quantile({0.1: 0.0}, 50) is None


def test_a_restarted_counter_counts_from_zero() -> None:
    before, after = parse(page(5, 10), 0.0), parse(page(1, 2), 1.0)
    assert growth("tandem_requests_total", before, after) == 2
    assert bucket_growth("tandem_ttft_seconds", before, after)[1.0] == 2


class Pods:
    """Canned replies by host; an absent host refuses the connection."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        self.now = 0.0
        self.prefilled = 0.0
        self.state: dict[str, Any] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/state":
            counters = {"prefill_tokens_total": self.prefilled}
            return httpx.Response(200, json={"load": LOAD, "counters": counters, **self.state})
        if request.url.host not in self.pages:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, text=self.pages[request.url.host])


@pytest.fixture
def pods() -> Pods:
    return Pods()


@pytest.fixture
def collector(pods: Pods) -> Collector:
    client = WorkerClient(transport=httpx.MockTransport(pods))
    return Collector(client, clock=lambda: pods.now)


ROUTERS = [PodAddress("r1", "r1", 80)]
WORKERS = Pair(
    [PodAddress("p1", "p1", 80)], [PodAddress("d1", "d1", 80), PodAddress("d2", "d2", 80)]
)


async def test_rates_and_latencies_over_the_window(pods: Pods, collector: Collector) -> None:
    pods.pages["r1"] = page()
    await collector.read(ROUTERS, WORKERS, Latency(95))
    pods.now, pods.pages["r1"] = 10.0, page(fast=10, total=20, inflight=4)
    pods.prefilled = 5000.0
    signals = await collector.read(ROUTERS, WORKERS, Latency(50))
    assert signals.requests_per_second == pytest.approx(2.0)
    assert signals.prefill.ttft_seconds == pytest.approx(0.1)
    assert signals.prefill.busy_workers == pytest.approx(0.5)
    assert signals.prefill.queued_seconds == pytest.approx(1.5)
    assert signals.decode.kv_usage == pytest.approx(0.75)
    assert signals.decode.num_running == 6
    assert not signals.idle


async def test_no_traffic_is_idle_and_not_stale(pods: Pods, collector: Collector) -> None:
    pods.pages["r1"] = page(total=5)
    await collector.read(ROUTERS, WORKERS, Latency(95))
    pods.now = 60.0
    signals = await collector.read(ROUTERS, WORKERS, Latency(95))
    assert signals.idle
    assert signals.age_seconds == 0
    assert signals.settled


async def test_a_killed_source_grows_old(pods: Pods, collector: Collector) -> None:
    assert (await collector.read(ROUTERS, WORKERS, Latency(95))).age_seconds == float("inf")
    pods.pages["r1"] = page()
    await collector.read(ROUTERS, WORKERS, Latency(95))
    del pods.pages["r1"]
    pods.now = 45.0
    assert (await collector.read(ROUTERS, WORKERS, Latency(95))).age_seconds == 45.0


async def test_a_dead_pod_takes_its_values_along(pods: Pods, collector: Collector) -> None:
    pods.pages |= {"r1": page(inflight=9), "r2": page(inflight=1)}
    both = [*ROUTERS, PodAddress("r2", "r2", 80)]
    assert (await collector.read(both, WORKERS, Latency(95))).num_inflight == 10
    assert (await collector.read(both[1:], WORKERS, Latency(95))).num_inflight == 1


async def test_latencies_of_one_class(pods: Pods, collector: Collector) -> None:
    pods.pages["r1"] = page()
    await collector.read(ROUTERS, WORKERS, Latency(50, "a"))
    pods.now, pods.pages["r1"] = 10.0, page(fast=30, total=40)
    mine = await collector.read(ROUTERS, WORKERS, Latency(50, "a"))
    assert mine.prefill.ttft_seconds is not None
    assert mine.attained_percent == pytest.approx(75.0)
    other = await collector.read(ROUTERS, WORKERS, Latency(50, "b"))
    assert other.prefill.ttft_seconds is None
    assert other.attained_percent is None


async def test_each_class_is_measured_at_its_percentile(pods: Pods, collector: Collector) -> None:
    pods.pages["r1"] = page()
    classes = [Latency(50, "a"), Latency(90, "a"), Latency(95, "b")]
    await collector.read(ROUTERS, WORKERS, Latency(50, "b"), classes)
    pods.now, pods.pages["r1"] = 10.0, page(fast=30, total=40)
    measured = (await collector.read(ROUTERS, WORKERS, Latency(50, "b"), classes)).classes
    assert [item.name for item in measured] == ["a", "a", "b"]
    half, most, none = (item.ttft_seconds for item in measured)
    assert half == pytest.approx(0.1 * 20 / 30)
    assert most == pytest.approx(0.1 + 0.9 * 6 / 10)
    assert none is None
    assert [item.attained_percent for item in measured] == [75.0, 75.0, None]


async def test_an_incomplete_reading_keeps_the_last_figures(
    pods: Pods, collector: Collector
) -> None:
    pods.pages["r1"] = page(inflight=7)
    await collector.read(ROUTERS, WORKERS, Latency(95))
    pods.now, pods.state = 5.0, {"load": {}}
    signals = await collector.read(ROUTERS, WORKERS, Latency(95))
    assert signals.age_seconds == 5.0
    assert signals.num_inflight == 7
    assert not signals.idle


async def test_a_break_as_long_as_the_window_starts_the_past_anew(
    pods: Pods, collector: Collector
) -> None:
    pods.pages["r1"] = page()
    for pods.now in (0.0, 20.0, 40.0):
        signals = await collector.read(ROUTERS, WORKERS, Latency(95))
    assert signals.settled
    del pods.pages["r1"]
    pods.now = 80.0
    await collector.read(ROUTERS, WORKERS, Latency(95))
    pods.pages["r1"] = page()
    assert not (await collector.read(ROUTERS, WORKERS, Latency(95))).settled


async def test_peaks_of_the_window_are_remembered(pods: Pods, collector: Collector) -> None:
    pods.pages["r1"] = page()
    pods.state = {"load": {**LOAD, "num_running": 9, "queued_prompt_seconds": 4.0}}
    await collector.read(ROUTERS, WORKERS, Latency(95))
    pods.now, pods.state = 10.0, {}
    signals = await collector.read(ROUTERS, WORKERS, Latency(95))
    assert signals.decode.peak_running == 9
    assert signals.prefill.peak_queued_seconds == 4.0
    assert signals.prefill.queued_seconds == 1.5


async def test_a_refused_request_is_seen_without_any_worker(
    pods: Pods, collector: Collector
) -> None:
    pods.pages["r1"] = page(total=5)
    nothing: Pair[list[PodAddress]] = Pair([], [])
    assert not (await collector.read(ROUTERS, nothing, Latency(95))).wanted
    pods.now, pods.pages["r1"] = 5.0, page(total=6)
    signals = await collector.read(ROUTERS, nothing, Latency(95))
    assert signals.wanted
    assert signals.age_seconds == 0
    assert not signals.idle


async def test_a_request_at_one_router_is_seen_while_another_is_silent(
    pods: Pods, collector: Collector
) -> None:
    routers = [*ROUTERS, PodAddress("r2", "silent", 80)]
    pods.pages["r1"] = page(inflight=1)
    signals = await collector.read(routers, Pair([], []), Latency(95))
    assert signals.wanted
    assert signals.age_seconds == float("inf")
    pods.now, pods.pages["r1"] = 60.0, page()
    assert not (await collector.read(routers, Pair([], []), Latency(95))).wanted
