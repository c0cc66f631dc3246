"""`tandem bench serve`: options to campaign, progress, tables, files."""

import json
import secrets
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from tandem_bench.report.document import Report, read_report, write_report
from tandem_bench.report.page import build_page
from tandem_bench.report.summary import Summary
from tandem_bench.report.table import render_comparison, render_summary, render_sweep
from tandem_bench.serve.campaign import Campaign, run_campaign
from tandem_bench.serve.generator import Counters
from tandem_bench.serve.settings import LoadSettings, Objectives
from tandem_bench.workload.prompts import PromptKind
from tandem_bench.workload.random_lengths import RandomLengths
from tandem_bench.workload.replay import ReplayOptions
from tandem_cli.bench_failure import parse_lengths, told
from tandem_cli.console import console, results
from tandem_cli.errors import CliError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The command line as given."""

    url: str
    model: str
    api_key: str = field(repr=False)
    rate: float | None
    rates: str
    burstiness: float
    concurrency: int
    num_requests: int
    duration: float
    input_len: str
    output_len: str
    prefix_share: float
    num_prefixes: int
    dataset: str
    trace: Path | None
    speed: float
    trace_start: float
    sample: float
    spread: bool
    length_scale: float
    max_input: int
    max_output: int
    seed: int
    nonce: int | None
    ignore_eos: bool
    temperature: float
    extra_body: str
    prompts: str
    vocab_size: int
    slo_ttft: float
    slo_tbt: float
    slo_tbt_percentile: float
    warmup: int
    request_timeout: float
    title: str

    def campaign(self) -> Campaign:
        """What to measure. Raises CliError for options that can't be read."""
        if self.dataset != "random":
            raise CliError(
                f"--dataset {self.dataset!r} is unknown",
                "set it to random, or replay a file with --trace",
            )
        return Campaign(
            url=self.url,
            model=self.model,
            api_key=self.api_key,
            title=self.title,
            rates=self._rates(),
            burstiness=self.burstiness,
            lengths=RandomLengths(
                input_range=parse_lengths(self.input_len, "--input-len"),
                output_range=parse_lengths(self.output_len, "--output-len"),
                prefix_share=self.prefix_share,
                num_prefixes=self.num_prefixes,
            ),
            trace=self.trace,
            replay=ReplayOptions(
                start=self.trace_start,
                speed=self.speed,
                sample=self.sample,
                spread=self.spread,
                length_scale=self.length_scale,
                max_input=self.max_input,
                max_output=self.max_output,
            ),
            load=LoadSettings(
                concurrency=self.concurrency,
                num_requests=self.num_requests,
                duration=self.duration,
                warmup=self.warmup,
                extra=self._extra(),
            ),
            objectives=Objectives(
                ttft=self.slo_ttft / 1e3,
                tbt=self.slo_tbt / 1e3,
                tbt_percentile=self.slo_tbt_percentile,
            ),
            seed=self.seed,
            nonce=secrets.randbits(31) if self.nonce is None else self.nonce,
            prompt_kind=self._prompt_kind(),
            vocab_size=self.vocab_size,
            request_timeout=self.request_timeout,
        )

    def _rates(self) -> tuple[float | None, ...]:
        if not self.rates:
            return (self.rate,)
        if self.rate is not None:
            raise CliError("--rate and --rates can't be combined", "remove one of them")
        try:
            return tuple(float(text) for text in self.rates.split(","))
        except ValueError:
            raise CliError(
                f"--rates {self.rates!r} is not a list of numbers", "write it like 1,2,4,8"
            ) from None

    def _extra(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"temperature": self.temperature}
        if self.ignore_eos:
            extra["ignore_eos"] = True
        if self.extra_body:
            try:
                given = json.loads(self.extra_body)
            except json.JSONDecodeError as error:
                raise CliError(
                    f"--extra-body is not JSON: {error}", "write it like '{\"top_p\": 0.9}'"
                ) from None
            if not isinstance(given, dict):
                raise CliError(
                    "--extra-body is not a JSON object", "write it like '{\"top_p\": 0.9}'"
                )
            extra |= given
        return extra

    def _prompt_kind(self) -> PromptKind | None:
        match self.prompts:
            case "ids" | "text":
                return self.prompts
            case "auto":
                return None
        raise CliError(f"--prompts {self.prompts!r} is unknown", "set it to auto, ids or text")


class RunBars:
    """One bar per run; on a pipe one line every tenth of it."""

    def __init__(self) -> None:
        # Drawn by hand, twice a second: a drawing thread would hold the interpreter while tokens
        # arrive.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[note]}[/]"),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._tenths: dict[TaskID, int] = {}

    def __enter__(self) -> "RunBars":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def start_run(self, number: int, label: str, total: int) -> Callable[[Counters], None]:
        """A bar for run `number`; what is returned moves it."""
        task = self._progress.add_task(label, total=total or None, note="")

        def move(counters: Counters) -> None:
            rate = counters.pieces / counters.elapsed if counters.elapsed else 0.0
            note = f"{counters.in_flight} in flight, {rate:,.0f} tok/s"
            if counters.failed:
                note += f", {counters.failed} failed"
            self._progress.update(task, completed=counters.finished, note=note)
            if console.is_terminal:
                self._progress.refresh()
                return
            tenth = 10 * counters.finished // total if total else int(counters.elapsed / 10)
            if self._tenths.get(task, -1) < tenth:
                self._tenths[task] = tenth
                of = f" of {total:,}" if total else ""
                console.print(f"{label}: {counters.finished:,}{of} answered, {note}")

        return move


def measure(options: ServeOptions, json_file: Path | None, html: Path | None) -> None:
    """Run, print, write."""
    campaign = options.campaign()
    summaries: list[Summary] = []

    def show(summary: Summary) -> None:
        summaries.append(summary)
        results.print(f"\n[bold]{summary.label}[/]")
        results.print(render_summary(summary, campaign.objectives))

    with told(), RunBars() as bars:
        report = run_campaign(campaign, bars.start_run, show, command_line())
    if len(summaries) > 1:
        results.print()
        results.print(render_sweep(summaries))
    with told():
        if json_file is not None:
            write_report(report, json_file)
            console.print(f"wrote {json_file}")
        if html is not None:
            write_page([("", report)], campaign.objectives, html)
    if summaries and not any(summary.completed for summary in summaries):
        raise CliError("no request was answered", "the failures above show why")


def compare_reports(
    first: Path, second: Path, html: Path | None, slo_ttft: float, slo_tbt: float
) -> None:
    """Two reports side by side."""
    with told():
        reports = [read_report(first), read_report(second)]
    names = (first.stem, second.stem) if first.stem != second.stem else (str(first), str(second))
    results.print(render_comparison(reports[0], reports[1], names))
    if html is not None:
        objectives = Objectives(ttft=slo_ttft / 1e3, tbt=slo_tbt / 1e3)
        write_page(list(zip(names, reports, strict=True)), objectives, html)


def write_page(reports: list[tuple[str, Report]], objectives: Objectives, html: Path) -> None:
    """The HTML file."""
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(build_page(reports, objectives))
    console.print(f"wrote {html}")


def command_line() -> str:
    """The command line as typed, without the key."""
    shown: list[str] = []
    for argument in sys.argv[1:]:
        hide = shown[-1:] == ["--api-key"] or argument.startswith("--api-key=")
        shown.append("--api-key=…" if hide and "=" in argument else "…" if hide else argument)
    return shlex.join(["tandem", *shown])
