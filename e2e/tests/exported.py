"""Every metric that operator, router and worker export, from their own tables."""

from dataclasses import dataclass
from typing import Final

from prometheus_client import Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from tandem_engine.metrics import METRICS as WORKER_METRICS
from tandem_engine.metrics import PREFIX
from tandem_operator.names.labels import LABEL_REVISION, LABEL_ROLE, LABEL_SERVICE
from tandem_operator.runtime.metrics import Metrics
from tandem_router.metrics import METRICS as ROUTER_METRICS

POD_TARGET_LABELS: Final = (LABEL_SERVICE, LABEL_ROLE, LABEL_REVISION)
"""The labels of pods that the chart's PodMonitor gives to what it scrapes."""
TARGET: Final = frozenset({"namespace", "pod"})
"""Labels that Prometheus' operator adds to what it scrapes."""
OF_PODS: Final = TARGET | {name.replace(".", "_").replace("/", "_") for name in POD_TARGET_LABELS}


@dataclass(frozen=True)
class Exported:
    """A metric. `labels` are its own, `all_labels` also those that scraping adds."""

    program: str
    name: str
    kind: str
    labels: tuple[str, ...]
    help: str

    @property
    def all_labels(self) -> frozenset[str]:
        return frozenset(self.labels) | (TARGET if self.program == "operator" else OF_PODS)


def exported_metrics() -> list[Exported]:
    """All of them, by program."""
    found = [
        Exported("operator", _name(each), _kind(each), each._labelnames, each._documentation)
        for each in vars(Metrics()).values()
        if isinstance(each, MetricWrapperBase)
    ]
    found += [Exported("router", m.name, m.kind, m.labels, m.text) for m in ROUTER_METRICS]
    for name, metric in WORKER_METRICS.items():
        found.append(Exported("worker", PREFIX + name, metric.kind, metric.labels, metric.help))
    return found


def series() -> dict[str, list[tuple[Exported, frozenset[str]]]]:
    """By the name of a time series: who exports it, and its labels."""
    found: dict[str, list[tuple[Exported, frozenset[str]]]] = {}
    for metric in exported_metrics():
        parts = {"": frozenset[str]()}
        if metric.kind == "histogram":
            parts = {"_bucket": frozenset({"le"}), "_sum": frozenset(), "_count": frozenset()}
        for part, more in parts.items():
            found.setdefault(metric.name + part, []).append((metric, metric.all_labels | more))
    return found


def _name(metric: MetricWrapperBase) -> str:
    """As Prometheus shows it; the library keeps a counter's name without its end."""
    return f"{metric._name}_total" if _kind(metric) == "counter" else str(metric._name)


def _kind(metric: MetricWrapperBase) -> str:
    return {Gauge: "gauge", Histogram: "histogram"}.get(type(metric), "counter")
