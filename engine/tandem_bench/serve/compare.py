"""Endpoints side by side under the same open loop: the same arrivals and lengths for each in turn.

Each rate is asked of one endpoint after the other, so that what changes on the machine meanwhile
meets all of them. They are never asked at the same time: they may share a GPU.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.table import Table

from tandem_bench.errors import EndpointError, WorkloadError
from tandem_bench.options import LENGTHS, argument, json_option, option, parse_lengths
from tandem_bench.record import Objectives
from tandem_bench.report.columns import milliseconds
from tandem_bench.report.document import Report
from tandem_bench.report.summary import Summary
from tandem_bench.report.table import render_summary
from tandem_bench.serve.campaign import Campaign, run_campaign
from tandem_bench.serve.command import command_line, run_bar
from tandem_bench.serve.generator import Counters, LoadSettings
from tandem_bench.terminal import Bars, notes, results
from tandem_bench.workload.random_lengths import RandomLengths

SCHEMA: Final = "tandem-bench-compare/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Compare endpoints under the same open loop: goodput, TTFT, every gap, the longest gap.

    Write NAME=URL for a name of your own:

        tandem bench compare fixed=http://127.0.0.1:8000 budget=http://127.0.0.1:8010 --rates 8,16
    """

    endpoints: tuple[str, ...] = argument("Two or more OpenAI endpoints.", metavar="[NAME=]URL...")
    rates: str = option("8", "Requests per second: one comparison for each of 1,2,4,8.")
    burstiness: float = option(1.0, "1: Poisson; less: bursts; inf: a metronome.")
    duration: float = option(10.0, "Seconds of sending, of each run.")
    input_len: str = option("1024", LENGTHS, metavar="N|LOW-HIGH")
    output_len: str = option("256", LENGTHS, metavar="N|LOW-HIGH")
    seed: int = option(0, "Seed of arrivals and lengths.")
    nonce: int | None = option(None, "Seed of the tokens, which no two runs share; default: new.")
    slo_ttft: float = option(500.0, "Objective for TTFT, in milliseconds; 0: none.")
    slo_tbt: float = option(50.0, "Objective for TBT, in milliseconds; 0: none.")
    slo_tbt_percentile: float = option(95.0, "Percentile of a request's gaps that it limits.")
    warmup: int = option(4, "Requests sent first and not counted, in every run.")
    vocab_size: int = option(0, "Token ids are below this; default: found by asking.")
    request_timeout: float = option(600.0, "Seconds for one whole request.")
    json_file: Path | None = json_option()

    def campaigns(self) -> list[Campaign]:
        """One for each endpoint and rate, those of a rate together. Raises WorkloadError."""
        named = name_endpoints(self.endpoints)
        try:
            rates = [float(text) for text in self.rates.split(",")]
        except ValueError:
            raise WorkloadError(
                f"--rates {self.rates!r} is not a list of rates", "write 1,2,4,8"
            ) from None
        first = secrets.randbits(30) if self.nonce is None else self.nonce
        base = Campaign(
            url="",
            burstiness=self.burstiness,
            lengths=RandomLengths(
                input_range=parse_lengths(self.input_len, "--input-len"),
                output_range=parse_lengths(self.output_len, "--output-len"),
            ),
            load=LoadSettings(
                duration=self.duration,
                warmup=self.warmup,
                extra={"temperature": 0.0, "ignore_eos": True},
            ),
            objectives=Objectives(
                ttft=self.slo_ttft / 1e3,
                tbt=self.slo_tbt / 1e3,
                tbt_percentile=self.slo_tbt_percentile,
            ),
            seed=self.seed,
            vocab_size=self.vocab_size,
            request_timeout=self.request_timeout,
        )
        pairs = [(rate, name, url) for rate in rates for name, url in named]
        return [
            replace(base, url=url, title=name, rates=(rate,), nonce=first + number)
            for number, (rate, name, url) in enumerate(pairs)
        ]


def name_endpoints(given: Sequence[str]) -> list[tuple[str, str]]:
    """Names and URLs of `NAME=URL` or `URL`. Raises WorkloadError for fewer than two, or a twin."""
    named = []
    for text in given:
        name, separator, url = text.partition("=")
        # A URL may have an equals sign too, behind its scheme.
        named.append((name, url) if separator and "://" not in name else (text, text))
    names = [name for name, _ in named]
    if len(named) < 2:
        raise WorkloadError("there is only one endpoint", "give two or more, as NAME=URL or URL")
    if twin := next((name for name in names if names.count(name) > 1), ""):
        raise WorkloadError(f"two endpoints are called {twin!r}", "name them: NAME=URL")
    return named


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the comparison."""

    name: str
    show: Callable[[Summary], str]


def _share(of: Callable[[Any], float]) -> Callable[[Summary], str]:
    return lambda s: f"{of(s.goodput):.1%}" if s.goodput is not None else "-"


def _ms(of: Callable[[Summary], float]) -> Callable[[Summary], str]:
    return lambda s: milliseconds(of(s)) if s.completed else "-"


_LINES: Final = (
    _Line("goodput, share of requests", _share(lambda found: found.share)),
    _Line("within TTFT", _share(lambda found: found.ttft_share)),
    _Line("within TBT", _share(lambda found: found.tbt_share)),
    _Line("output tokens/s", lambda s: f"{s.output_per_second:,.0f}"),
    _Line("TTFT p50, ms", _ms(lambda s: s.ttft.p50)),
    _Line("TTFT p95, ms", _ms(lambda s: s.ttft.p95)),
    _Line("TTFT p99, ms", _ms(lambda s: s.ttft.p99)),
    _Line("TBT p50, ms", _ms(lambda s: s.tbt.p50)),
    _Line("TBT p95, ms", _ms(lambda s: s.tbt.p95)),
    _Line("TBT p99, ms", _ms(lambda s: s.tbt.p99)),
    _Line("longest gap, ms", _ms(lambda s: s.tbt.largest)),
    _Line("failed", lambda s: f"{s.failed:,}"),
)


def render_side_by_side(label: str, named: Sequence[tuple[str, Summary]]) -> Table:
    """One rate, a column for each endpoint."""
    table = Table(title=label, title_justify="left", box=None, header_style="dim")
    table.add_column("")
    for name, _ in named:
        table.add_column(name, justify="right")
    for line in _LINES:
        table.add_row(line.name, *(line.show(summary) for _, summary in named))
    return table


def run(options: Options) -> None:
    """Ask, print, write. Raises EndpointError when an endpoint answered nothing."""
    campaigns = options.campaigns()
    reports: list[Report] = []
    found: dict[str, list[tuple[str, Summary]]] = {}
    with Bars() as bars:
        for campaign in campaigns:
            reports.append(_ask(campaign, bars))
            summary = reports[-1].runs[-1].summary
            found.setdefault(summary.label, []).append((campaign.title, summary))
            if summary.interrupted:
                break
    for named in found.values():
        for name, summary in named:
            if summary.failures or summary.warnings:
                results.print(f"\n[bold]{name}, {summary.label}[/]")
                results.print(render_summary(summary, campaigns[0].objectives))
    for label, named in found.items():
        results.print()
        results.print(render_side_by_side(label, named))
    if options.json_file is not None:
        options.json_file.parent.mkdir(parents=True, exist_ok=True)
        document = {"schema": SCHEMA, "reports": reports}
        options.json_file.write_bytes(msgspec.json.encode(document) + b"\n")
        notes.print(f"wrote {options.json_file}")
    for name, summary in (pair for named in found.values() for pair in named):
        if not summary.completed:
            raise EndpointError(f"{name} answered no request", "the kinds of failure above say why")


def _ask(campaign: Campaign, bars: Bars) -> Report:
    """One run of one endpoint."""

    def start_run(_: int, label: str, total: int) -> Callable[[Counters], None]:
        return run_bar(bars, f"{campaign.title}, {label}", total, campaign.load.duration)

    return run_campaign(campaign, start_run, lambda _: None, command_line())
