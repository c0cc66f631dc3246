"""Reads Prometheus text: samples, the growth of counters, and quantiles of histograms."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Sample:
    """One line of a metrics page."""

    labels: Mapping[str, str]
    value: float

    def fits(self, labels: Mapping[str, str]) -> bool:
        """Whether it has all of these labels."""
        return labels.items() <= self.labels.items()


@dataclass(frozen=True)
class Scrape:
    """One reading of one pod: its samples by name, as in the text (`…_bucket`, `…_total`)."""

    at: float
    samples: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float:
        """The sum over all samples of this name that have these labels."""
        return sum(item.value for item in self.samples.get(name, ()) if item.fits(labels))

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """Cumulative counts of histogram `name` by upper bound, summed over what has the labels."""
        counts: dict[float, float] = {}
        for item in self.samples.get(f"{name}_bucket", ()):
            if item.fits(labels):
                bound = float(item.labels["le"])
                counts[bound] = counts.get(bound, 0.0) + item.value
        return counts


def parse(text: str, at: float) -> Scrape:
    """A metrics page as a `Scrape`. ValueError when it isn't Prometheus text."""
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(Sample(sample.labels, sample.value))
    return Scrape(at, {name: tuple(samples) for name, samples in found.items()})


def growth(name: str, first: Scrape, last: Scrape, **labels: str) -> float:
    """How much a counter grew; a counter that went back was restarted and counts from zero."""
    before, after = first.total(name, **labels), last.total(name, **labels)
    return after - before if after >= before else after


def bucket_growth(name: str, first: Scrape, last: Scrape, **labels: str) -> dict[float, float]:
    """Cumulative counts of a histogram's samples between two readings, by upper bound."""
    before, after = first.buckets(name, **labels), last.buckets(name, **labels)
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
