"""Which charts a report has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem_bench.record import Objectives
from tandem_bench.report.chart import Chart, Rule, Series
from tandem_bench.report.distribution import Distribution
from tandem_bench.report.summary import Summary

MILLI = 1e3
MAX_LINES = 6


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of one report; several groups are compared."""

    name: str
    summaries: Sequence[Summary]

    def label(self, summary: Summary, alone: bool) -> str:
        """A line's name."""
        return summary.label if alone else f"{self.name} · {summary.label}"


@dataclass(frozen=True, slots=True)
class Line:
    """A run with its name and colour."""

    name: str
    summary: Summary
    color: int
    dashed: bool


def choose_lines(groups: Sequence[Group]) -> list[Line]:
    """At most six runs for the charts that overlay them, spread over the sweep.

    Of two compared reports the second is dashed and shares the first one's colours; runs that both
    have are preferred.
    """
    room = max(1, MAX_LINES // max(1, len(groups)))
    common = set.intersection(*({s.label for s in group.summaries} for group in groups))
    lines = []
    for number, group in enumerate(groups):
        some = [s for s in group.summaries if not common or s.label in common]
        if len(some) > room:
            last = len(some) - 1
            some = [some[round(at * last / max(1, room - 1))] for at in range(room)]
        alone = len(groups) == 1
        one_each = all(len(each.summaries) == 1 for each in groups)
        for at, summary in enumerate(some):
            color = number if one_each else at
            lines.append(Line(group.label(summary, alone), summary, color, number > 0))
    return lines


def build_charts(groups: Sequence[Group], objectives: Objectives) -> list[Chart]:
    """All charts for which there is data."""
    lines = choose_lines(groups)
    charts = [
        _cdf("Time to first token", lines, lambda s: s.ttft, objectives.ttft),
        _cdf("Time between tokens, every gap", lines, lambda s: s.tbt, objectives.tbt),
    ]
    if any(len(group.summaries) > 1 for group in groups):
        charts += _sweep_charts(groups, objectives)
    charts += _time_charts(lines, objectives)
    charts += [
        _cdf("Tail gap: mean of a request's longest tenth", lines, lambda s: s.tail_gap, 0.0),
        _cdf("End to end", lines, lambda s: s.e2e, 0.0),
    ]
    return [chart for chart in charts if any(series.points for series in chart.series)]


def _cdf(
    title: str, lines: Sequence[Line], pick: Callable[[Summary], Distribution], objective: float
) -> Chart:
    found = [(line, pick(line.summary)) for line in lines]
    found = [(line, values) for line, values in found if values.count]
    high = max((v.largest for _, v in found), default=1.0)
    # Pieces that arrive together have no gap at all: there is no need to see how small.
    low = min((max(v.curve[1][1], v.p50 / 50, high / 1e5, 1e-6) for _, v in found), default=1.0)
    log = high / low > 30
    floor = low * MILLI / 1.5 if log else 0.0
    series = [
        Series(
            line.name,
            [(max(value * MILLI, floor), level) for level, value in values.curve],
            line.color,
            dashed=line.dashed,
        )
        for line, values in found
    ]
    rules = [Rule(objective * MILLI, "objective", vertical=True)] if objective > 0 else []
    return Chart(title, "ms", "% of values at or below", series, log_x=log, y_top=100, rules=rules)


def _sweep_charts(groups: Sequence[Group], objectives: Objectives) -> list[Chart]:
    def against_rate(
        pick: Callable[[Summary], float | None], name: str, color: int, number: int, group: Group
    ) -> Series:
        points = [(_rate_of(s), pick(s)) for s in group.summaries]
        points.sort(key=lambda point: point[0])
        label = name if len(groups) == 1 else f"{group.name} · {name}"
        return Series(label, points, color, dashed=number > 0, markers=True)

    def chart(
        title: str,
        y_label: str,
        picks: Sequence[tuple[str, Callable[[Summary], float | None]]],
        objective: float = 0.0,
        y_top: float | None = None,
    ) -> Chart:
        series = [
            against_rate(pick, name, color, number, group)
            for number, group in enumerate(groups)
            for color, (name, pick) in enumerate(picks)
        ]
        values = [y for line in series for _, y in line.points if y]
        log = y_top is None and bool(values) and max(values) / min(values) > 50
        rules = [Rule(objective * MILLI, "objective")] if objective > 0 else []
        x_label = "requests/s offered"
        return Chart(title, x_label, y_label, series, log_y=log, rules=rules, y_top=y_top)

    charts = [
        chart(
            "TTFT against rate",
            "ms",
            _percentiles(lambda s: s.ttft),
            objectives.ttft,
        ),
        chart(
            "TBT against rate",
            "ms",
            _percentiles(lambda s: s.tbt),
            objectives.tbt,
        ),
        chart("Throughput against rate", "output tokens/s", [("output", _output)]),
    ]
    if any(s.goodput for group in groups for s in group.summaries):
        good = "requests within the objectives"
        charts.append(
            chart(
                "Goodput against rate",
                f"% of {good}",
                [("good", lambda s: 100 * s.goodput.share if s.goodput else None)],
                y_top=100,
            )
        )
    return charts


def _percentiles(
    pick: Callable[[Summary], Distribution],
) -> list[tuple[str, Callable[[Summary], float | None]]]:
    return [
        ("p50", lambda s: pick(s).p50 * MILLI),
        ("p90", lambda s: pick(s).p90 * MILLI),
        ("p99", lambda s: pick(s).p99 * MILLI),
    ]


def _output(summary: Summary) -> float:
    return summary.output_per_second


def _rate_of(summary: Summary) -> float:
    rate = summary.rate
    return rate if rate is not None and rate < 1e9 else summary.offered_per_second


def _time_charts(lines: Sequence[Line], objectives: Objectives) -> list[Chart]:
    def over_time(pick: Callable[[Line], Sequence[float | None]]) -> list[Series]:
        return [
            Series(
                line.name,
                [
                    ((at + 0.5) * line.summary.timeline.step, value)
                    for at, value in enumerate(pick(line))
                ],
                line.color,
                dashed=line.dashed,
                filled=len(lines) == 1,
            )
            for line in lines
        ]

    rules = [Rule(objectives.ttft * MILLI, "objective")] if objectives.ttft > 0 else []
    return [
        Chart(
            "Throughput over time",
            "seconds",
            "output tokens/s",
            over_time(lambda line: line.summary.timeline.output_per_second),
        ),
        Chart(
            "Requests in flight",
            "seconds",
            "requests",
            over_time(lambda line: line.summary.timeline.in_flight),
        ),
        Chart(
            "Requests sent",
            "seconds",
            "requests/s",
            over_time(lambda line: line.summary.timeline.sent_per_second),
        ),
        Chart(
            "TTFT over time, p50 of what was sent then",
            "seconds",
            "ms",
            over_time(
                lambda line: [
                    None if value is None else value * MILLI
                    for value in line.summary.timeline.ttft_p50
                ]
            ),
            rules=rules,
        ),
    ]
