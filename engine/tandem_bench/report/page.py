"""One HTML file with everything in it: no script, nothing from elsewhere, light and dark."""

from collections.abc import Sequence
from html import escape
from importlib import resources

from tandem_bench.record import Objectives
from tandem_bench.report.chart import Chart, draw
from tandem_bench.report.columns import count, milliseconds, rate_text, spread
from tandem_bench.report.document import Report
from tandem_bench.report.plots import Group, build_charts
from tandem_bench.report.summary import Summary
from tandem_bench.report.table import compared_rows, pair_runs


def build_page(reports: Sequence[tuple[str, Report]], objectives: Objectives) -> str:
    """The page of one report, or of two side by side."""
    groups = [Group(name, [run.summary for run in report.runs]) for name, report in reports]
    title = reports[0][1].title if len(reports) == 1 else " against ".join(n for n, _ in reports)
    parts = [_header(title, reports)]
    alone = len(reports) == 1
    if alone and len(groups[0].summaries) == 1:
        parts.append(_tiles(groups[0].summaries[0]))
    parts += [_warnings(group, alone) for group in groups]
    parts.append(_runs_table(groups, alone))
    parts.append('<section class="charts">')
    parts += [_figure(chart) for chart in build_charts(groups, objectives)]
    parts.append("</section>")
    if not alone:
        pairs = pair_runs(reports[0][1], reports[1][1])
        parts += [_comparison(one, other, reports, len(pairs) == 1) for one, other in pairs]
    parts += [_stalls(group, alone) for group in groups]
    parts += [_failures(group, alone) for group in groups]
    parts += [_config(name if not alone else "", report) for name, report in reports]
    style = (resources.files("tandem_bench") / "report" / "page.css").read_text()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _header(title: str, reports: Sequence[tuple[str, Report]]) -> str:
    lines = "".join(
        f"<p><b>{escape(name)}</b> {escape(report.started)} · <code>{escape(report.command)}</code>"
        "</p>"
        for name, report in reports
    )
    return f"<header><h1>{escape(title)}</h1>{lines}</header>"


def _tiles(summary: Summary) -> str:
    tiles = [
        ("output tokens/s", count(summary.output_per_second), ""),
        ("requests/s", count(summary.requests_per_second), f"{summary.completed:,} answered"),
        (
            "TTFT p50",
            f"{milliseconds(summary.ttft.p50)} ms",
            f"p99 {milliseconds(summary.ttft.p99)}",
        ),
        ("TBT p50", f"{milliseconds(summary.tbt.p50)} ms", f"p99 {milliseconds(summary.tbt.p99)}"),
        ("longest gap", f"{milliseconds(summary.tbt.largest)} ms", ""),
    ]
    if summary.goodput is not None:
        share = f"{summary.goodput.share:.1%} of requests"
        tiles.append(("goodput/s", count(summary.goodput.requests_per_second), share))
    tiles.append(("failed", f"{summary.failed:,}", f"of {summary.sent:,}"))
    cells = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<small>{escape(more)}</small></div>"
        for name, value, more in tiles
    )
    return f'<section class="tiles">{cells}</section>'


def _warnings(group: Group, alone: bool) -> str:
    found = [
        f"<li>{escape(group.label(summary, alone))}: {escape(warning)}</li>"
        for summary in group.summaries
        for warning in (
            *summary.warnings,
            *(["interrupted; what was under way is not counted"] if summary.interrupted else []),
        )
    ]
    return f'<section class="warnings"><ul>{"".join(found)}</ul></section>' if found else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _runs_table(groups: Sequence[Group], alone: bool) -> str:
    head = ["run", "asked req/s", "req/s", "out tok/s", "in tok/s",
            "TTFT ms p50 / p90 / p99 / max",
            "TBT ms p50 / p90 / p99 / max",
            "in flight", "good", "failed", "late p99 ms"]  # fmt: skip
    rows = [
        [
            group.label(summary, alone),
            rate_text(summary.rate),
            count(summary.requests_per_second),
            count(summary.output_per_second),
            count(summary.input_per_second),
            spread(summary.ttft),
            spread(summary.tbt),
            f"{summary.peak_in_flight:,}",
            f"{summary.goodput.share:.1%}" if summary.goodput else "-",
            f"{summary.failed:,}",
            milliseconds(summary.lag.p99),
        ]
        for group in groups
        for summary in group.summaries
    ]
    return f"<section><h2>Runs</h2>{_table(head, rows)}</section>"


def _comparison(
    one: Summary, other: Summary, reports: Sequence[tuple[str, Report]], unfolded: bool
) -> str:
    rows = []
    for row in compared_rows(one, other):
        a, b = row.value(one), row.value(other)
        rows.append([row.name, row.show(one), row.show(other), f"{b / a:.2f}x" if a else "-"])
    table = _table(["", reports[0][0], reports[1][0], "ratio"], rows)
    title = one.label if one.label == other.label else f"{one.label} / {other.label}"
    opened = " open" if unfolded else ""
    return (
        f'<section><details{opened} class="figures"><summary>{escape(title)}</summary>{table}'
        "</details></section>"
    )


def _figure(chart: Chart) -> str:
    names = ""
    if len(chart.series) > 1:
        names = "".join(
            f'<li class="c{series.color % 6}{" dashed" if series.dashed else ""}">'
            f"{escape(series.name)}</li>"
            for series in chart.series
        )
        names = f'<ul class="legend">{names}</ul>'
    return f"<figure><figcaption>{escape(chart.title)}</figcaption>{names}{draw(chart)}</figure>"


def _stalls(group: Group, alone: bool) -> str:
    rows = [
        [
            group.label(summary, alone),
            milliseconds(stall.seconds),
            f"{stall.num_requests:,}",
            f"{stall.at:.2f}",
            f"{stall.request}",
            f"{stall.piece}",
        ]
        for summary in group.summaries
        for stall in summary.stalls[: 10 if len(group.summaries) == 1 else 3]
    ]
    if not rows:
        return ""
    head = ["run", "gap ms", "answers that paused", "until second", "longest in request", "piece"]
    return f"<section><h2>Longest stalls</h2>{_table(head, rows)}</section>"


def _failures(group: Group, alone: bool) -> str:
    rows = [
        [group.label(summary, alone), f"{failure.count:,}", failure.kind, failure.example]
        for summary in group.summaries
        for failure in summary.failures
    ]
    if not rows:
        return ""
    table = _table(["run", "requests", "kind", "example"], rows)
    return f"<section><h2>Failures</h2>{table}</section>"


def _config(name: str, report: Report) -> str:
    rows = [[key, str(value)] for key, value in report.config.items()]
    rows += [[key, value] for key, value in report.environment.items()]
    heading = f"Configuration {name}".strip()
    return (
        f"<section><details open><summary>{escape(heading)}</summary>"
        f"{_table(['setting', 'value'], rows)}</details></section>"
    )
