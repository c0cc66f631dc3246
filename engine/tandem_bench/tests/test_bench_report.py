"""Figures and pages from known samples."""

import io
import math
from array import array
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tandem_bench.errors import ReportError
from tandem_bench.record import Objectives, RequestRecord, RunResult
from tandem_bench.report.chart import Axis, Chart, Series, draw
from tandem_bench.report.distribution import Distribution
from tandem_bench.report.document import Report, RequestRow, Run, read_report, write_report
from tandem_bench.report.page import build_page
from tandem_bench.report.summary import Summary, peak_in_flight, summarize, tail_gap
from tandem_bench.report.table import render_comparison, render_summary, render_sweep
from tandem_bench.report.timeline import build_timeline, round_step

NONE = Objectives()


def answer(
    number: int, sent: float, ttft: float, gaps: list[float], late: float = 0.0, error: str = ""
) -> RequestRecord:
    times = np.cumsum([sent + ttft, *gaps]).tolist()
    return RequestRecord(
        number,
        scheduled=sent - late,
        sent=sent,
        ended=times[-1],
        requested_input=10,
        requested_output=len(times),
        input_tokens=10,
        output_tokens=len(times),
        times=array("d", times),
        error=error,
        detail="because" if error else "",
    )


def summary_of(records: list[RequestRecord], objectives: Objectives = NONE) -> Summary:
    result = RunResult(records=records, pulses=array("d", [0.001] * 10), seconds=10.0)
    return summarize(result, "a run", 2.0, objectives)


def test_percentiles_of_a_known_sample() -> None:
    found = Distribution.of(range(1, 102))
    assert (found.count, found.mean, found.p50, found.p90) == (101, 51, 51, 91)
    assert (found.p95, found.p99, found.largest) == (96, 100, 101)
    assert found.curve[0] == (0, 1)
    assert found.curve[-1] == (100, 101)
    assert [level for level, _ in found.curve] == sorted({level for level, _ in found.curve})


def test_percentiles_between_two_values_are_interpolated() -> None:
    assert Distribution.of([1.0, 3.0]).p50 == 2.0
    assert Distribution.of([1.0, 3.0]).p90 == pytest.approx(2.8)


def test_nothing_and_what_is_no_number() -> None:
    assert Distribution.of([]) == Distribution()
    assert Distribution.of([math.nan, 2.0]).count == 1


def test_latencies_and_rates_of_a_run() -> None:
    records = [
        answer(0, 0.0, 0.1, [0.01] * 9),
        answer(1, 1.0, 0.3, [0.01] * 8 + [0.5], late=0.02),
        answer(2, 2.0, 0.2, [], error="HTTP 500"),
    ]
    found = summary_of(records)
    assert (found.sent, found.completed, found.failed) == (3, 2, 1)
    assert found.seconds == pytest.approx(2.2)
    assert found.output_tokens == 20
    assert found.output_per_second == pytest.approx(20 / 2.2)
    assert found.offered_per_second == pytest.approx(1.0)
    assert found.ttft.mean == pytest.approx(0.2)
    assert found.ttft.largest == pytest.approx(0.3)
    assert found.tbt.count == 18
    assert found.tbt.p50 == pytest.approx(0.01)
    assert found.tbt.largest == pytest.approx(0.5)
    assert found.tpot.largest == pytest.approx(0.58 / 9)
    longest = found.stalls[0]
    assert (longest.request, longest.piece, longest.num_requests) == (1, 9, 1)
    assert longest.at == pytest.approx(1.88)
    assert [(failure.kind, failure.count) for failure in found.failures] == [("HTTP 500", 1)]
    assert found.lag.largest == pytest.approx(0.02)
    assert any("sent late" in warning for warning in found.warnings)


def test_goodput_counts_what_meets_both_objectives() -> None:
    records = [
        answer(0, 0.0, 0.1, [0.01] * 99),
        answer(1, 0.0, 0.9, [0.01] * 99),  # first token too late
        answer(2, 0.0, 0.1, [0.01] * 90 + [0.2] * 9),  # nine gaps of 99 too long
        answer(3, 0.0, 0.1, [0.01] * 96 + [0.2] * 3),  # three of 99: p95 is fine
        answer(4, 0.0, 0.1, [0.01], error="timeout"),
    ]
    found = summary_of(records, Objectives(ttft=0.5, tbt=0.05)).goodput
    assert found is not None
    assert (found.count, found.share, found.ttft_share, found.tbt_share) == (2, 0.4, 0.6, 0.6)
    strict = Objectives(ttft=0.5, tbt=0.05, tbt_percentile=100)
    assert summary_of(records, strict).goodput.count == 1  # type: ignore[union-attr]
    assert summary_of(records).goodput is None


def test_the_tail_gap_is_the_mean_of_the_longest_tenth() -> None:
    assert tail_gap(np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])) == 10.5
    assert tail_gap(np.array([4.0])) == 4.0


def test_answers_that_pause_together_are_one_stall() -> None:
    together = [answer(number, number / 100, 0.1, [0.01, 0.4, 0.01]) for number in range(5)]
    alone = answer(9, 3.0, 0.1, [0.01, 0.3])
    stalls = summary_of([*together, alone]).stalls
    assert [(stall.num_requests, round(stall.seconds, 3)) for stall in stalls[:2]] == [
        (5, 0.4),
        (1, 0.3),
    ]
    assert summary_of([answer(0, 0.0, 0.1, [])]).stalls == []


def test_requests_in_flight() -> None:
    records = [answer(0, 0.0, 4.0, []), answer(1, 1.0, 1.0, []), answer(2, 3.0, 2.0, [])]
    assert peak_in_flight(records) == 2
    timeline = build_timeline(records, 5.0)
    assert timeline.step * sum(timeline.in_flight) == pytest.approx(4 + 1 + 2)
    assert timeline.step * sum(timeline.sent_per_second) == pytest.approx(3)
    assert timeline.step * sum(timeline.output_per_second) == pytest.approx(3)
    assert len(timeline.in_flight) == len(timeline.ttft_p50) <= 120


@pytest.mark.parametrize(
    ("width", "step"), [(0.9, 1), (1.0, 1), (1.1, 2), (2.1, 5), (6, 10), (0.03, 0.05)]
)
def test_bins_have_round_widths(width: float, step: float) -> None:
    assert round_step(width) == pytest.approx(step)


def test_a_run_without_answers_is_still_a_summary() -> None:
    found = summary_of([answer(0, 0.0, 0.1, [], error="no connection")])
    assert (found.completed, found.ttft.count, found.output_per_second) == (0, 0, 0.0)
    assert summary_of([]).sent == 0


def report_of(*summaries: Summary) -> Report:
    rows = [RequestRow.of(answer(0, 0.0, 0.1, [0.01]))]
    return Report(
        title="tiny <model>",
        started="now",
        command="tandem bench serve",
        config={"seed": 0},
        environment={},
        runs=[Run(summary, rows) for summary in summaries],
    )


class Checker(HTMLParser):
    """Every tag is closed, nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.num_charts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.num_charts += tag == "svg"
        if tag not in ("meta", "line", "path", "circle"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "path", "circle"):
            assert self.open.pop() == tag


def check_page(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert not checker.links
    assert "<script" not in page
    assert "http://" not in page
    assert "nan" not in page.lower().replace("tenant", "")
    return checker


def test_a_report_survives_the_file(tmp_path: Path) -> None:
    report = report_of(summary_of([answer(0, 0.0, 0.1, [0.01] * 3)]))
    write_report(report, tmp_path / "deep" / "a.json")
    assert read_report(tmp_path / "deep" / "a.json") == report


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "other"}'])
def test_another_file_is_no_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ReportError, match="is not a report"):
        read_report(tmp_path / "a.json")


def test_the_page_holds_everything_and_fetches_nothing() -> None:
    objectives = Objectives(ttft=0.15, tbt=0.05)
    records = [answer(number, number / 5, 0.1 + number / 50, [0.01] * 20) for number in range(20)]
    summary = summary_of([*records, answer(99, 1.0, 0.1, [], error="a <b> error")], objectives)
    page = build_page([("", report_of(summary))], objectives)
    assert check_page(page).num_charts >= 8
    assert "tiny &lt;model&gt;" in page
    assert "a &lt;b&gt; error" in page
    assert "objective" in page


def test_sweeps_and_comparisons_are_drawn() -> None:
    one, other = (
        [
            summary_of([answer(n, n / rate, ttft * rate, [0.01] * 5) for n in range(9)])
            for rate in (1, 2, 4)
        ]
        for ttft in (0.1, 0.05)
    )
    reports = [("ours", report_of(*one)), ("theirs", report_of(*other))]
    page = build_page(reports, NONE)
    assert check_page(page).num_charts >= 11
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_comparison(reports[0][1], reports[1][1], ("ours", "theirs")))
    console.print(render_sweep(one))
    console.print(render_summary(one[0], Objectives(ttft=1.0)) if one[0].goodput else "")
    told = console.export_text()
    assert "0.50x" in told
    assert "ours" in told


def test_a_sweep_names_the_highest_rate_that_was_served() -> None:
    runs = [
        summary_of(
            [answer(n, n / rate, 0.1 * rate, [0.01]) for n in range(9)], Objectives(ttft=limit)
        )
        for rate, limit in ((1, 0.5), (2, 0.5), (9, 0.5))
    ]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_sweep(runs))
    console.print(render_sweep(runs[2:]))
    told = console.export_text()
    assert "within the objectives: a run" in told
    assert "within the objectives: none of these" in told


def test_charts_without_data_say_so() -> None:
    assert "no data" in draw(Chart("t", "x", "y", [Series("a", [(0, None)], 0)]))
    assert "<svg" in draw(Chart("t", "x", "y", [Series("a", [(1.0, 2.0)], 0)], log_x=True))


def test_ticks_are_round_and_inside() -> None:
    assert Axis(0, 103, 0, 100).ticks() == pytest.approx([0, 50, 100])
    log = Axis(0.8, 30, 0, 100, log=True)
    assert log.ticks() == pytest.approx([1, 2, 5, 10, 20])
    assert log.place(0.8) == 0
    assert log.place(30) == pytest.approx(100)
