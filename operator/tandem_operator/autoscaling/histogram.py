"""Prometheus text into counter values, and the growth of histograms into quantiles."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Scrape:
    """One reading of one pod: sums over all label sets.

    `buckets[name][le]` are cumulative counts of histogram `name`; `totals` are counters and gauges,
    by name, and by name plus one label as `name{label="value"}`.
    """

    at: float
    buckets: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)


def parse(text: str, at: float) -> Scrape:
    """A metrics page as a `Scrape`. ValueError when it isn't Prometheus text."""
    buckets: dict[str, dict[float, float]] = {}
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                of_name = buckets.setdefault(sample.name.removesuffix("_bucket"), {})
                bound = float(sample.labels["le"])
                of_name[bound] = of_name.get(bound, 0.0) + sample.value
                continue
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
            for label, value in sample.labels.items():
                key = f'{sample.name}{{{label}="{value}"}}'
                totals[key] = totals.get(key, 0.0) + sample.value
    return Scrape(at, buckets, totals)


def growth(name: str, first: Scrape | None, last: Scrape) -> float:
    """How much a counter grew; a counter that went back was restarted and counts from zero."""
    before = first.totals.get(name, 0.0) if first else 0.0
    after = last.totals.get(name, 0.0)
    return after - before if after >= before else after


def bucket_growth(name: str, first: Scrape | None, last: Scrape) -> dict[float, float]:
    """Cumulative counts of a histogram's samples between two readings, by upper bound."""
    after = last.buckets.get(name, {})
    before = first.buckets.get(name, {}) if first else {}
    if any(after.get(bound, 0.0) < count for bound, count in before.items()):
        before = {}
    return {bound: count - before.get(bound, 0.0) for bound, count in after.items()}


def merge_buckets(parts: Iterable[Mapping[float, float]]) -> dict[float, float]:
    """Several pods' cumulative counts as one."""
    merged: dict[float, float] = {}
    for part in parts:
        for bound, count in part.items():
            merged[bound] = merged.get(bound, 0.0) + count
    return merged


def quantile(buckets: Mapping[float, float], percentile: int) -> float | None:
    """The percentile by linear interpolation inside its bucket; None without samples.

    In the last, open bucket the answer is its lower bound, as Prometheus does.
    """
    total = max(buckets.values(), default=0.0)
    if total <= 0:
        return None
    rank = total * percentile / 100
    low, below = 0.0, 0.0
    for bound in sorted(buckets):
        count = buckets[bound]
        if count >= rank:
            if bound == float("inf"):
                return low
            inside = count - below
            return low + (bound - low) * ((rank - below) / inside if inside else 1.0)
        low, below = bound, count
    return low
