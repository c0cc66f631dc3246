"""Reports in the terminal."""

from collections.abc import Sequence
from typing import Final

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tandem_bench.record import Objectives
from tandem_bench.report.columns import ROWS, Row, count, milliseconds, rate_text, spread
from tandem_bench.report.distribution import Distribution
from tandem_bench.report.document import Report
from tandem_bench.report.summary import Summary

GOOD_SHARE: Final = 0.9
"""Share of requests that must be within the objectives for a rate to count as served."""


def render_summary(summary: Summary, objectives: Objectives) -> RenderableType:
    """One run: headline, latencies, goodput, tail gaps, failures, the generator itself."""
    parts: list[RenderableType] = [_headline(summary), _latencies(summary)]
    if summary.goodput is not None:
        parts.append(_goodput_line(summary, objectives))
    if summary.stalls:
        told = ", ".join(
            f"{milliseconds(stall.seconds)} ms at {stall.at:.1f} s ({stall.num_requests} requests)"
            for stall in summary.stalls[:3]
        )
        parts.append(Text(f"longest stalls: {told}"))
    for failure in summary.failures:
        parts.append(
            Text.from_markup(f"[red]{failure.count:,} x {escape(failure.kind)}[/] ")
            + Text(failure.example[:160].replace("\n", " "))
        )
    lag, loop = summary.lag, summary.loop_lag
    parts.append(
        Text(
            f"generator: {summary.generator_cpu:.0%} of a core; sent late by p50 "
            f"{milliseconds(lag.p50)}, p99 {milliseconds(lag.p99)}, max "
            f"{milliseconds(lag.largest)} ms; loop late by p99 {milliseconds(loop.p99)} ms",
            style="dim",
        )
    )
    parts += [Text(f"warning: {warning}", style="bold yellow") for warning in summary.warnings]
    if summary.interrupted:
        parts.append(Text("interrupted: what was under way is not counted", style="bold yellow"))
    return Stack(*parts)


def _headline(summary: Summary) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right", style="bold")
    table.add_column()
    table.add_column(justify="right", style="bold")
    table.add_row(
        "requests", f"{summary.completed:,} of {summary.sent:,}",
        "seconds", f"{summary.seconds:,.2f}",
    )  # fmt: skip
    table.add_row(
        "requests/s", count(summary.requests_per_second),
        "offered", f"{count(summary.offered_per_second)} (asked {rate_text(summary.rate)})",
    )  # fmt: skip
    table.add_row(
        "output tokens/s", count(summary.output_per_second),
        "input tokens/s", count(summary.input_per_second),
    )  # fmt: skip
    cached = summary.cached_tokens / summary.input_tokens if summary.input_tokens else 0.0
    table.add_row(
        "most in flight", f"{summary.peak_in_flight:,}",
        "prompt tokens cached", f"{cached:.1%}",
    )  # fmt: skip
    return table


def _latencies(summary: Summary) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("milliseconds")
    for name in ("mean", "p50", "p90", "p95", "p99", "max", "samples"):
        table.add_column(name, justify="right")
    rows: list[tuple[str, Distribution]] = [
        ("TTFT", summary.ttft),
        ("TBT, every gap", summary.tbt),
        ("TPOT, per request", summary.tpot),
        ("tail gap", summary.tail_gap),
        ("end to end", summary.e2e),
    ]
    for name, values in rows:
        if values.count:
            figures = (values.mean, values.p50, values.p90, values.p95, values.p99, values.largest)
            table.add_row(name, *map(milliseconds, figures), f"{values.count:,}")
    return table


def _goodput_line(summary: Summary, objectives: Objectives) -> Text:
    goodput = summary.goodput
    assert goodput is not None
    wanted = []
    if objectives.ttft > 0:
        wanted.append(f"TTFT ≤ {milliseconds(objectives.ttft)} ms")
    if objectives.tbt > 0:
        wanted.append(f"p{objectives.tbt_percentile:g} TBT ≤ {milliseconds(objectives.tbt)} ms")
    return Text(
        f"goodput: {count(goodput.requests_per_second)} requests/s, {goodput.share:.1%} of all "
        f"within {' and '.join(wanted)} "
        f"(TTFT {goodput.ttft_share:.1%}, TBT {goodput.tbt_share:.1%})",
        style="bold",
    )


def render_sweep(summaries: Sequence[Summary]) -> RenderableType:
    """One line per run; with objectives, the highest rate that met them."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    names = ("run", "requests/s", "out tok/s", "TTFT ms p50/p90/p99/max", "TBT ms p50/p90/p99/max")
    for name in (*names, "good", "failed", "sent late p99"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for summary in summaries:
        table.add_row(
            summary.label,
            count(summary.requests_per_second),
            count(summary.output_per_second),
            spread(summary.ttft),
            spread(summary.tbt),
            f"{summary.goodput.share:.1%}" if summary.goodput else "-",
            f"{summary.failed:,}",
            milliseconds(summary.lag.p99),
        )
    good = [s for s in summaries if s.goodput and s.goodput.share >= GOOD_SHARE]
    if not any(s.goodput for s in summaries):
        return table
    best = max(good, key=lambda s: s.offered_per_second, default=None)
    told = best.label if best is not None else "none of these"
    return Stack(table, Text(f"highest rate with {GOOD_SHARE:.0%} within the objectives: {told}"))


def pair_runs(first: Report, second: Report) -> list[tuple[Summary, Summary]]:
    """Runs with the same label, or simply in order when there is none."""
    ours = [run.summary for run in first.runs]
    theirs = {run.summary.label: run.summary for run in second.runs}
    same = [(each, theirs[each.label]) for each in ours if each.label in theirs]
    return same or list(zip(ours, (run.summary for run in second.runs), strict=False))


def compared_rows(one: Summary, other: Summary) -> list[Row]:
    """Goodput only where both have an objective."""
    both = one.goodput is not None and other.goodput is not None
    return [row for row in ROWS if both or not row.name.startswith("goodput")]


def render_comparison(first: Report, second: Report, names: tuple[str, str]) -> RenderableType:
    """Side by side, with the second as a multiple of the first."""
    parts: list[RenderableType] = []
    for one, other in pair_runs(first, second):
        title = one.label if one.label == other.label else f"{one.label} / {other.label}"
        table = Table(title=title, title_justify="left", box=None, header_style="dim")
        table.add_column("")
        for name in (*names, "ratio"):
            table.add_column(name, justify="right")
        for row in compared_rows(one, other):
            a, b = row.value(one), row.value(other)
            ratio = b / a if a else 0.0
            style = "" if not a or abs(ratio - 1) < 0.02 else "green"
            if style and (ratio > 1) != row.more_is_better:
                style = "red"
            shown = Text(f"{ratio:.2f}x" if a else "-", style=style)
            table.add_row(row.name, row.show(one), row.show(other), shown)
        parts.append(table)
    return Stack(*parts)
