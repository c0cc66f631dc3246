"""Prometheus metrics of one router, measured where the client's bytes leave.

The two histograms that see every token are plain lists behind a collector: a hundred thousand
observations a second must not cost a lock each.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem_router.config import RouterConfig, SloClass

BUCKETS: Final = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15,
    0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0, 120.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """A metric as Prometheus shows it; the first label is always the served model's name."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...]


def _spec(
    name: str, kind: Literal["counter", "gauge", "histogram"], text: str, *labels: str
) -> MetricSpec:
    return MetricSpec(f"tandem_{name}", kind, text, ("model", *labels))


TTFT: Final = _spec(
    "ttft_seconds", "histogram", "From a request's arrival to its first token.", "class", "pool"
)
TBT: Final = _spec(
    "tbt_seconds", "histogram", "Every gap between tokens of a sequence.", "class", "pool"
)
TBT_TAIL: Final = _spec(
    "tbt_tail_seconds", "histogram", "Mean of the longest tenth of a sequence's gaps.", "class",
    "pool",
)  # fmt: skip
E2E: Final = _spec(
    "e2e_seconds", "histogram", "From a request's arrival to its last byte.", "class"
)
REQUESTS: Final = _spec("requests_total", "counter", "Requests by HTTP status.", "code", "class")
REJECTED: Final = _spec("rejected_total", "counter", "Requests turned away.", "reason")
FAILOVERS: Final = _spec("failovers_total", "counter", "Re-submissions.", "stage")
PROMPT_TOKENS: Final = _spec("prompt_tokens_total", "counter", "Prompt tokens.", "cached")
OUTPUT_TOKENS: Final = _spec("output_tokens_total", "counter", "Tokens generated.")
SLO_ATTAINED: Final = _spec(
    "slo_attained_total", "counter", "Sequences that kept an objective.", "class", "objective"
)
SLO_MISSED: Final = _spec(
    "slo_missed_total", "counter", "Sequences that broke an objective.", "class", "objective"
)
INFLIGHT: Final = _spec("inflight", "gauge", "Sequences that run or wait for a worker.")

METRICS: Final = (
    TTFT, TBT, TBT_TAIL, E2E, REQUESTS, REJECTED, FAILOVERS, PROMPT_TOKENS, OUTPUT_TOKENS,
    SLO_ATTAINED, SLO_MISSED, INFLIGHT,
)  # fmt: skip
"""Everything that `/metrics` shows."""


class TokenHistogram(Collector):
    """A histogram by SLO class that costs one bisection per observation."""

    def __init__(self, spec: MetricSpec, model: str, pool: str) -> None:
        """`pool` says whose latency it is: that of "prefill" or of "decode"."""
        self._spec = spec
        self._model = model
        self._pool = pool
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, slo_class: str, seconds: float) -> None:
        """Count one sample."""
        counts = self._counts.get(slo_class)
        if counts is None:
            counts = self._counts[slo_class] = [0] * (len(BUCKETS) + 1)
            self._sums[slo_class] = 0.0
        counts[bisect_left(BUCKETS, seconds)] += 1
        self._sums[slo_class] += seconds

    def collect(self) -> Iterator[Metric]:
        """What Prometheus reads."""
        spec = self._spec
        family = HistogramMetricFamily(spec.name, spec.text, labels=spec.labels)
        for slo_class, counts in self._counts.items():
            total = 0
            buckets: list[tuple[str, float]] = []
            for bound, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
                total += count
                buckets.append((bound, total))
            labels = [self._model, slo_class, self._pool]
            family.add_metric(labels, buckets, self._sums[slo_class])
        yield family


class RouterMetrics:
    """Everything the router counts. One registry per router, so that tests can run several."""

    def __init__(self, config: RouterConfig) -> None:
        self.registry = CollectorRegistry()
        self._model = model = config.model_name
        self._classes = {entry.name: entry for entry in config.slo_classes}
        self._ttft = TokenHistogram(TTFT, model, "prefill")
        self._tbt = TokenHistogram(TBT, model, "decode")
        self.registry.register(self._ttft)
        self.registry.register(self._tbt)
        self._tail = self._histogram(TBT_TAIL)
        self._e2e = self._histogram(E2E)
        self._requests = self._counter(REQUESTS)
        self._rejected = self._counter(REJECTED)
        self._failovers = self._counter(FAILOVERS)
        self._prompt_tokens = self._counter(PROMPT_TOKENS)
        self._output_tokens = self._counter(OUTPUT_TOKENS)
        self._output_tokens.labels(model)  # a counter that is there at zero can be rated
        self._attained = self._counter(SLO_ATTAINED)
        self._missed = self._counter(SLO_MISSED)
        gauge = Gauge(INFLIGHT.name, INFLIGHT.text, INFLIGHT.labels, registry=self.registry)
        self._inflight = gauge.labels(model)
        self._inflight.set(0)

    def _counter(self, spec: MetricSpec) -> Counter:
        return Counter(spec.name, spec.text, spec.labels, registry=self.registry)

    def _histogram(self, spec: MetricSpec) -> Histogram:
        return Histogram(spec.name, spec.text, spec.labels, buckets=BUCKETS, registry=self.registry)

    def ttft(self, slo_class: str, seconds: float) -> None:
        """A first token."""
        self._ttft.observe(slo_class, seconds)
        entry = self._classes.get(slo_class)
        if entry is not None and entry.ttft_seconds:
            self._judge(entry, "ttft", seconds <= entry.ttft_seconds)

    def tbt(self, slo_class: str, seconds: float) -> None:
        """A gap between two tokens."""
        self._tbt.observe(slo_class, seconds)

    def sequence_done(
        self, slo_class: str, num_prompt: int, num_cached: int, num_output: int, gaps: list[float]
    ) -> None:
        """A sequence that produced tokens has ended."""
        self._prompt_tokens.labels(self._model, "true").inc(num_cached)
        self._prompt_tokens.labels(self._model, "false").inc(max(num_prompt - num_cached, 0))
        self._output_tokens.labels(self._model).inc(num_output)
        if not gaps:
            return
        tail = tail_mean(gaps)
        self._tail.labels(self._model, slo_class, "decode").observe(tail)
        entry = self._classes.get(slo_class)
        if entry is not None and entry.tbt_seconds:
            self._judge(entry, "tbt", tail <= entry.tbt_seconds)

    def _judge(self, entry: SloClass, objective: str, kept: bool) -> None:
        counter = self._attained if kept else self._missed
        counter.labels(self._model, entry.name, objective).inc()

    def request_done(self, slo_class: str, code: int, seconds: float) -> None:
        """A generation request was answered."""
        self._requests.labels(self._model, str(code), slo_class).inc()
        if code == 200:
            self._e2e.labels(self._model, slo_class).observe(seconds)

    def rejected(self, reason: str) -> None:
        """A request was turned away for lack of room or workers."""
        self._rejected.labels(self._model, reason).inc()

    def failover(self, stage: str) -> None:
        """An attempt had to be made again."""
        self._failovers.labels(self._model, stage).inc()

    def inflight(self, count: int) -> None:
        """How many sequences are under way."""
        self._inflight.set(count)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


def tail_mean(gaps: Sequence[float]) -> float:
    """Mean of the longest 10 % of the gaps (at least one): Mooncake's TBT."""
    ordered: Iterable[float] = sorted(gaps, reverse=True)[: max(1, len(gaps) // 10)]
    longest = list(ordered)
    return sum(longest) / len(longest)
