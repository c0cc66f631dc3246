"""The columns of every summary table, once for the terminal and the page."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tandem_bench.report.distribution import Distribution
from tandem_bench.report.summary import Summary


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of a run: its name, its text, its value, and whether more is better."""

    name: str
    show: Callable[[Summary], str]
    value: Callable[[Summary], float]
    more_is_better: bool


def milliseconds(seconds: float) -> str:
    """With about three digits."""
    value = seconds * 1e3
    if value >= 10_000:
        return f"{value / 1e3:,.1f} s"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def count(value: float) -> str:
    """A rate or a number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def spread(values: Distribution) -> str:
    """p50, p90, p99 and the largest."""
    if not values.count:
        return "-"
    return " / ".join(map(milliseconds, (values.p50, values.p90, values.p99, values.largest)))


def rate_text(rate: float | None) -> str:
    """What was asked for."""
    return "-" if rate is None else "inf" if rate > 1e9 else f"{rate:g}"


def _latency(name: str, pick: Callable[[Summary], Distribution]) -> list[Row]:
    def row(level: str) -> Row:
        field = {"max": "largest"}.get(level, level)

        def value(summary: Summary) -> float:
            return float(getattr(pick(summary), field))

        return Row(
            f"{name} {level}, ms",
            lambda s: milliseconds(value(s)) if pick(s).count else "-",
            value,
            False,
        )

    return [row(level) for level in ("mean", "p50", "p90", "p95", "p99", "max")]


ROWS: Final = [
    Row(
        "requests/s", lambda s: count(s.requests_per_second), lambda s: s.requests_per_second, True
    ),
    Row(
        "output tokens/s", lambda s: count(s.output_per_second), lambda s: s.output_per_second, True
    ),
    Row("input tokens/s", lambda s: count(s.input_per_second), lambda s: s.input_per_second, True),
    *_latency("TTFT", lambda s: s.ttft),
    *_latency("TBT", lambda s: s.tbt),
    *_latency("tail gap", lambda s: s.tail_gap),
    *_latency("end to end", lambda s: s.e2e),
    Row("failed", lambda s: f"{s.failed:,}", lambda s: float(s.failed), False),
    Row(
        "goodput, requests/s",
        lambda s: count(s.goodput.requests_per_second) if s.goodput else "-",
        lambda s: s.goodput.requests_per_second if s.goodput else 0.0,
        True,
    ),
]
"""What a comparison prints, in order."""
