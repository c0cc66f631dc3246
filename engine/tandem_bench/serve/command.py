"""Load on any OpenAI endpoint: from options to campaign, progress, tables and files."""

import json
import secrets
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem_bench.errors import EndpointError, WorkloadError
from tandem_bench.options import LENGTHS, json_option, option, parse_lengths
from tandem_bench.record import Objectives
from tandem_bench.report.document import Report, read_report, write_report
from tandem_bench.report.page import build_page
from tandem_bench.report.summary import Summary
from tandem_bench.report.table import render_comparison, render_summary, render_sweep
from tandem_bench.serve.campaign import Campaign, run_campaign
from tandem_bench.serve.generator import Counters, LoadSettings
from tandem_bench.terminal import Bars, notes, results
from tandem_bench.workload.prompts import PromptKind
from tandem_bench.workload.random_lengths import RandomLengths
from tandem_bench.workload.replay import ReplayOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Load an OpenAI endpoint and measure TTFT, every gap, tail gaps and goodput.

    An **open loop** (`--rate`, `--rates`, `--trace`) sends when a request is due, whatever became
    of the ones before; a **closed loop** (`--concurrency`) keeps that many under way.

        tandem bench serve --rates 1,2,4,8 --duration 60 --slo-ttft 500 --slo-tbt 50 --html out.html

    Works the same against vLLM and SGLang; see docs/benchmarking.md.
    """

    url: str = option("http://127.0.0.1:8000", "Any OpenAI endpoint.")
    model: str = option("", "Default: the first of /v1/models.")
    api_key: str = option("", "Default: $OPENAI_API_KEY, or none.", secret=True)
    rate: float | None = option(None, "Open loop: requests per second; `inf`: all at once.")
    rates: str = option("", "A sweep of such rates: 1,2,4,8.")
    burstiness: float = option(1.0, "1: Poisson; less: bursts; inf: a metronome.")
    concurrency: int = option(0, "Closed loop: this many requests under way at any time.")
    num_requests: int = option(0, "Requests of each run.")
    duration: float = option(0.0, "Seconds of sending, of each run.")
    input_len: str = option("512", LENGTHS, metavar="N|LOW-HIGH")
    output_len: str = option("128", LENGTHS, metavar="N|LOW-HIGH")
    prefix_share: float = option(0.0, "Share of each prompt that is common to many (0 to 1).")
    num_prefixes: int = option(1, "How many common prefixes there are.")
    dataset: str = option("random", "Only `random`; --trace replays a file instead.")
    trace: Path | None = option(None, "Replay a Mooncake, Azure, ServeGen or Vidur file.")
    speed: float = option(1.0, "Replay this many times faster.")
    trace_start: float = option(0.0, "Seconds of the trace to leave out.")
    sample: float = option(1.0, "Share of the trace's requests to keep.")
    spread: bool = option(True, "Spread requests of one timestamp until the next one.")
    length_scale: float = option(1.0, "Scale the trace's lengths.")
    max_input: int = option(0, "Cut the trace's prompts to this many tokens; 0: never.")
    max_output: int = option(0, "Cut the trace's answers to this many tokens; 0: never.")
    seed: int = option(0, "Seed of arrivals and lengths.")
    nonce: int | None = option(
        None, "Seed of the tokens; default: a new one, so that no cache has seen them."
    )
    ignore_eos: bool = option(True, "Answers have exactly the planned length.")
    temperature: float = option(0.0, "0 is greedy.")
    extra_body: str = option("", "JSON object that goes with every request.")
    prompts: str = option("auto", "`auto`, `ids` or `text`.")
    vocab_size: int = option(0, "Token ids are below this; default: found by asking.")
    slo_ttft: float = option(0.0, "Objective for TTFT, in milliseconds.")
    slo_tbt: float = option(0.0, "Objective for TBT, in milliseconds.")
    slo_tbt_percentile: float = option(
        95.0, "Percentile of a request's gaps that --slo-tbt limits."
    )
    warmup: int = option(2, "Requests sent first and not counted.")
    request_timeout: float = option(600.0, "Seconds for one whole request.")
    title: str = option("", "Heading of the report.")
    json_file: Path | None = json_option()
    html: Path | None = option(None, "Write a page with plots.")
    compare: tuple[Path, Path] | None = option(
        None, "Measure nothing: set two --json files side by side."
    )

    def campaign(self) -> Campaign:
        """What is to be measured. Raises WorkloadError for what can't be read."""
        if self.dataset != "random":
            raise WorkloadError(
                f"--dataset {self.dataset!r} is unknown",
                "use random, or replay a file with --trace",
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
            objectives=self.objectives(),
            seed=self.seed,
            nonce=secrets.randbits(31) if self.nonce is None else self.nonce,
            prompt_kind=self._prompt_kind(),
            vocab_size=self.vocab_size,
            request_timeout=self.request_timeout,
        )

    def objectives(self) -> Objectives:
        """What a request must meet, in seconds."""
        return Objectives(
            ttft=self.slo_ttft / 1e3,
            tbt=self.slo_tbt / 1e3,
            tbt_percentile=self.slo_tbt_percentile,
        )

    def _rates(self) -> tuple[float | None, ...]:
        if not self.rates:
            return (self.rate,)
        if self.rate is not None:
            raise WorkloadError("--rate and --rates exclude each other", "drop one of them")
        try:
            return tuple(float(text) for text in self.rates.split(","))
        except ValueError:
            raise WorkloadError(
                f"--rates {self.rates!r} is not a list of rates", "write 1,2,4,8"
            ) from None

    def _extra(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"temperature": self.temperature}
        if self.ignore_eos:
            extra["ignore_eos"] = True
        if self.extra_body:
            try:
                given = json.loads(self.extra_body)
            except json.JSONDecodeError as error:
                raise WorkloadError(f"--extra-body: {error}", "give a JSON object") from None
            if not isinstance(given, dict):
                raise WorkloadError("--extra-body is not a JSON object", "write '{\"top_p\": 0.9}'")
            extra |= given
        return extra

    def _prompt_kind(self) -> PromptKind | None:
        match self.prompts:
            case "ids" | "text":
                return self.prompts
            case "auto":
                return None
        raise WorkloadError(f"--prompts {self.prompts!r} is unknown", "use auto, ids or text")


def run(options: Options) -> None:
    """Measure, or compare what was measured."""
    if options.compare is not None:
        compare_reports(options.compare, options)
    else:
        measure(options)


def measure(options: Options) -> None:
    """Run, print, write."""
    campaign = options.campaign()
    summaries: list[Summary] = []

    def show(summary: Summary) -> None:
        summaries.append(summary)
        results.print(f"\n[bold]{summary.label}[/]")
        results.print(render_summary(summary, campaign.objectives))

    with Bars() as bars:

        def start_run(_: int, label: str, total: int) -> Callable[[Counters], None]:
            return run_bar(bars, label, total, campaign.load.duration)

        report = run_campaign(campaign, start_run, show, command_line())
    if len(summaries) > 1:
        results.print()
        results.print(render_sweep(summaries))
    if options.json_file is not None:
        write_report(report, options.json_file)
        notes.print(f"wrote {options.json_file}")
    if options.html is not None:
        write_page([("", report)], campaign.objectives, options.html)
    if summaries and not any(summary.completed for summary in summaries):
        raise EndpointError("no request was answered", "the kinds of failure above say why")


def run_bar(bars: Bars, label: str, total: int, duration: float) -> Callable[[Counters], None]:
    """A bar for one run of `total` requests, or of `duration` seconds where they aren't counted."""

    def move(counters: Counters) -> None:
        rate = counters.pieces / counters.elapsed if counters.elapsed else 0.0
        of = f" of {total:,}" if total else ""
        note = f"{counters.finished:,}{of} answered, {counters.in_flight} in flight"
        note += f", {rate:,.0f} tok/s"
        if counters.failed:
            note += f", {counters.failed} failed"
        done = counters.finished / total if total else counters.elapsed / max(duration, 1e-9)
        bars.update(label, min(done, 1.0), note)

    return move


def compare_reports(files: tuple[Path, Path], options: Options) -> None:
    """Two reports side by side."""
    first, second = files
    reports = [read_report(first), read_report(second)]
    names = (first.stem, second.stem) if first.stem != second.stem else (str(first), str(second))
    results.print(render_comparison(reports[0], reports[1], names))
    if options.html is not None:
        write_page(list(zip(names, reports, strict=True)), options.objectives(), options.html)


def write_page(reports: list[tuple[str, Report]], objectives: Objectives, html: Path) -> None:
    """The HTML file."""
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(build_page(reports, objectives))
    notes.print(f"wrote {html}")


def command_line() -> str:
    """As typed, without the key."""
    shown: list[str] = []
    for argument in sys.argv[1:]:
        hide = shown[-1:] == ["--api-key"] or argument.startswith("--api-key=")
        shown.append("--api-key=…" if hide and "=" in argument else "…" if hide else argument)
    return shlex.join(["tandem", *shown])
