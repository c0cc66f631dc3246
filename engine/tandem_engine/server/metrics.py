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
    Metric,
)

from tandem_engine.frames import CoreStats
from tandem_engine.server.status import WorkerStatus

SECONDS_BUCKETS: Final = tuple(
    round(base * 10.0**power, 6) for power in range(-3, 2) for base in (1, 2, 3, 5, 7)
)
COUNT_BUCKETS: Final = tuple(float(2**power) for power in range(13))
PREFIX: Final = "tandem_"

_LABELLED = re.compile(r"^(?P<name>[a-z_]+)\{(?P<labels>.*)\}$")
_LABEL = re.compile(r'([a-z_]+)="([^"]*)"')


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
        return HistogramMetricFamily(name, _describe(name), buckets=buckets, sum_value=self._sum)


class WorkerMetrics:
    """A collector: newest counters and gauges, histograms of all samples so far.

    Names come from the core without the `tandem_` prefix; a name may carry labels as Prometheus
    writes them: `kv_transfer_bytes_total{backend="tcp"}`.
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

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus-client at every scrape."""
        config, state = self._status.config, self._status.state
        info = GaugeMetricFamily(
            f"{PREFIX}worker_info",
            "The worker; always 1",
            labels=["worker", "model", "role", "boot"],
        )
        info.add_metric([config.worker_id, config.served_model_name, state.role, config.boot_id], 1)
        yield info
        ready = not self._status.not_ready()
        yield GaugeMetricFamily(f"{PREFIX}worker_ready", "Takes new work", value=float(ready))
        if self._stats is None:
            return
        blocks = GaugeMetricFamily(
            f"{PREFIX}kv_ledger_blocks", "KV blocks by what the ledger has them for", labels=["use"]
        )
        for use, number in self._stats.ledger.items():
            blocks.add_metric([use], float(number))
        yield blocks
        yield from _families(self._stats.counters, CounterMetricFamily)
        yield from _families(self._stats.gauges, GaugeMetricFamily)
        for name, histogram in self._histograms.items():
            yield histogram.family(PREFIX + name)

    def render(self) -> bytes:
        """The page at /metrics."""
        return generate_latest(self._registry)


def _families(
    values: dict[str, float], kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
) -> Iterator[Metric]:
    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for full_name, value in sorted(values.items()):
        match = _LABELLED.match(full_name)
        name = match["name"] if match else full_name
        labels = dict(_LABEL.findall(match["labels"])) if match else {}
        family = families.get(name)
        if family is None:
            family = kind(PREFIX + name, _describe(name), labels=list(labels))
            families[name] = family
        family.add_metric(list(labels.values()), value)
    yield from families.values()


def _describe(name: str) -> str:
    return name.removeprefix(PREFIX).replace("_", " ").capitalize()
