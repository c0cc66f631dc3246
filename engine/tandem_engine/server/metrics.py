"""The worker's metrics, from the core's reports, in the text form of Prometheus."""

import bisect
import re
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import Metric as MetricFamily

from tandem_engine import metrics
from tandem_engine.frames import CoreStats
from tandem_engine.metrics import METRICS, PREFIX
from tandem_engine.server.status import WorkerStatus

SECONDS_BUCKETS: Final = tuple(
    round(base * 10.0**power, 6) for power in range(-3, 2) for base in (1, 2, 3, 5, 7)
)
COUNT_BUCKETS: Final = tuple(float(2**power) for power in range(13))

_LABELLED = re.compile(r"^(?P<name>[a-z_]+)\{(?P<labels>.*)\}$")
_LABEL = re.compile(r'([a-z_]+)="([^"]*)"')


Family = CounterMetricFamily | GaugeMetricFamily


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, values: Iterable[float]) -> None:
        for value in values:
            self._counts[bisect.bisect_left(self._bounds, value)] += 1
            self._sum += value

    def family(self, name: str) -> HistogramMetricFamily:
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        return HistogramMetricFamily(
            PREFIX + name, METRICS[name].help, buckets=buckets, sum_value=self._sum
        )


class WorkerMetrics:
    """A collector: newest counters and gauges, histograms of all samples so far.

    The core's reports name them as `METRICS` does, with labels as Prometheus writes them:
    `kv_transfer_bytes_total{backend="tcp",direction="in"}`.
    """

    def __init__(self, status: WorkerStatus) -> None:
        self._status = status
        self._stats: CoreStats | None = None
        self._histograms: dict[str, _Histogram] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def update(self, stats: CoreStats) -> None:
        """Take a report; its samples are counted once."""
        self._stats = stats
        for name, values in stats.observations.items():
            histogram = self._histograms.get(name)
            if histogram is None:
                bounds = SECONDS_BUCKETS if name.endswith("_seconds") else COUNT_BUCKETS
                histogram = self._histograms[name] = _Histogram(bounds)
            histogram.observe(values)

    def collect(self) -> Iterator[MetricFamily]:
        """Called by prometheus-client at every scrape."""
        config, state = self._status.config, self._status.state
        info = _family(metrics.WORKER_INFO)
        info.add_metric([config.worker_id, config.served_model_name, state.role, config.boot_id], 1)
        yield info
        ready = _family(metrics.WORKER_READY)
        ready.add_metric([], float(not self._status.not_ready()))
        yield ready
        if self._stats is None:
            return
        blocks = _family(metrics.KV_LEDGER_BLOCKS)
        for use, number in self._stats.ledger.items():
            blocks.add_metric([use], float(number))
        yield blocks
        yield from _families(self._stats.counters)
        yield from _families(self._stats.gauges)
        for name, histogram in self._histograms.items():
            yield histogram.family(name)

    def render(self) -> bytes:
        """The page at /metrics."""
        return generate_latest(self._registry)


def split_name(full_name: str) -> tuple[str, dict[str, str]]:
    """The name in the table and the labels of `name{label="value",…}`."""
    match = _LABELLED.match(full_name)
    return (match["name"], dict(_LABEL.findall(match["labels"]))) if match else (full_name, {})


def _families(values: dict[str, float]) -> Iterator[Family]:
    families: dict[str, Family] = {}
    for full_name, value in sorted(values.items()):
        name, labels = split_name(full_name)
        family = families.get(name)
        if family is None:
            family = families[name] = _family(name)
        family.add_metric([labels[label] for label in METRICS[name].labels], value)
    yield from families.values()


def _family(name: str) -> Family:
    metric = METRICS[name]
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(PREFIX + name, metric.help, labels=metric.labels)
