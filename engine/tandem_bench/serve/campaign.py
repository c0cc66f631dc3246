"""A whole call of `tandem bench serve`: endpoint, runs of a sweep, report."""

import asyncio
import os
import platform
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from tandem_bench.errors import WorkloadError
from tandem_bench.record import Objectives
from tandem_bench.report.document import Report, RequestRow, Run
from tandem_bench.report.summary import Summary, summarize
from tandem_bench.serve.endpoint import Endpoint, Prompts
from tandem_bench.serve.generator import Counters, LoadGenerator, LoadSettings
from tandem_bench.workload.planned import PlannedRequest
from tandem_bench.workload.prompts import PromptKind, PromptMaker
from tandem_bench.workload.random_lengths import RandomLengths, plan_random
from tandem_bench.workload.recorded import read_trace
from tandem_bench.workload.replay import ReplayOptions, plan_trace
from tandem_bench.workload.trace_rows import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """What one call measures. A rate of None is a closed loop, or the trace's own times."""

    url: str
    model: str = ""
    api_key: str = ""
    title: str = ""
    rates: tuple[float | None, ...] = (None,)
    burstiness: float = 1.0
    lengths: RandomLengths = field(default_factory=RandomLengths)
    trace: Path | None = None
    replay: ReplayOptions = field(default_factory=ReplayOptions)
    load: LoadSettings = field(default_factory=LoadSettings)
    objectives: Objectives = field(default_factory=Objectives)
    seed: int = 0
    nonce: int = 0  # another one draws other tokens for the same plan
    prompt_kind: PromptKind | None = None  # None: token ids where they are taken
    vocab_size: int = 0  # 0: found by asking
    request_timeout: float = 600.0

    def check(self) -> None:
        """Raise WorkloadError for combinations that make no sense."""
        self.load.check()
        if self.load.concurrency and self.rates != (None,):
            raise WorkloadError(
                "--concurrency is a closed loop and --rate an open one", "give only one of them"
            )
        if not self.load.concurrency and self.trace is None and None in self.rates:
            raise WorkloadError("no option says when to send", "give --rate or --concurrency")
        if self.trace is None and not (self.load.num_requests or self.load.duration):
            raise WorkloadError("no option says when to end", "give --num-requests or --duration")
        endless = any(rate is not None and rate > 1e9 for rate in self.rates)
        if endless and not self.load.num_requests:
            raise WorkloadError(
                "--rate inf sends everything at once, however much that is", "give --num-requests"
            )


OnRun = Callable[[int, str, int], Callable[[Counters], None]]
"""Called before each run with its number, label and number of requests (0: unknown)."""


def run_campaign(
    campaign: Campaign, on_run: OnRun, on_summary: Callable[[Summary], None], command: str
) -> Report:
    """Run a campaign on an event loop of its own. Ctrl-C ends it early with what was measured.

    Raises:
        BenchError: the endpoint can't be measured, or the options make no sense.
    """
    campaign.check()
    trace = read_trace(campaign.trace, campaign.seed) if campaign.trace else None
    return uvloop.run(measure(campaign, trace, on_run, on_summary, command))


async def measure(
    campaign: Campaign,
    trace: Trace | None,
    on_run: OnRun,
    on_summary: Callable[[Summary], None],
    command: str,
) -> Report:
    """Run a campaign on the running event loop; `trace` is already read."""
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    runs: list[Run] = []
    async with Endpoint.open(
        campaign.url, campaign.model, campaign.api_key, campaign.request_timeout
    ) as endpoint:
        model = await endpoint.discover()
        prompts = await _choose_prompts(campaign, endpoint)
        for number, rate in enumerate(campaign.rates):
            label = run_label(campaign, rate)
            summary, rows = await _one_run(
                campaign, trace, endpoint, prompts, (number, rate, label), on_run
            )
            runs.append(Run(summary, rows))
            on_summary(summary)
            if summary.interrupted:
                break
    return Report(
        title=campaign.title or f"{model} at {endpoint.url}",
        started=started,
        command=command,
        config={**_config(campaign, trace), "model": model, "prompts": prompts.kind,
                "vocabulary": prompts.vocab_size},
        environment=_environment(),
        runs=runs,
    )  # fmt: skip


async def _one_run(
    campaign: Campaign,
    trace: Trace | None,
    endpoint: Endpoint,
    prompts: Prompts,
    run: tuple[int, float | None, str],
    on_run: OnRun,
) -> tuple[Summary, list[RequestRow]]:
    number, rate, label = run
    maker = PromptMaker(
        prompts.kind, prompts.vocab_size, campaign.seed, nonce=campaign.nonce, salt=number
    )
    total = campaign.load.num_requests
    workload = plan(campaign, trace, rate)
    if trace is not None:
        # Planned ahead, so that the progress bar knows the end and drawing costs no send time.
        planned = list(workload)[: total or None]
        if campaign.load.duration and not campaign.load.concurrency:
            planned = [each for each in planned if each.at < campaign.load.duration]
        total, workload = len(planned), iter(planned)
    generator = LoadGenerator(endpoint, maker, campaign.load, on_run(number, label, total))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, generator.stop)
    try:
        await generator.warm_up()
        result = await generator.run(workload)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    summary = summarize(result, label, rate, campaign.objectives)
    rows = [RequestRow.of(record) for record in result.records if record.sent == record.sent]
    return summary, rows


async def _choose_prompts(campaign: Campaign, endpoint: Endpoint) -> Prompts:
    extra = campaign.load.extra
    if campaign.prompt_kind == "text":
        return Prompts("text", 1 << 16)
    found = await endpoint.choose_prompts(extra, campaign.vocab_size)
    if campaign.prompt_kind == "ids" and found.kind != "ids":
        raise WorkloadError(
            f"{endpoint.url} takes no token ids, but --prompts is ids", "use --prompts auto"
        )
    return found


def plan(campaign: Campaign, trace: Trace | None, rate: float | None) -> Iterator[PlannedRequest]:
    """The requests of one run."""
    if trace is None:
        return plan_random(campaign.lengths, rate, campaign.seed, campaign.burstiness)
    if campaign.load.concurrency and rate is None and not trace.timed:
        rate = float("inf")  # no one waits for a time in a closed loop
    return plan_trace(trace, campaign.replay, rate, campaign.seed)


def run_label(campaign: Campaign, rate: float | None) -> str:
    """A run's name in tables and legends."""
    if campaign.load.concurrency:
        return f"{campaign.load.concurrency} at a time"
    if rate is None:
        speed = campaign.replay.speed
        return "trace" if speed == 1 else f"trace x {speed:g}"
    return "all at once" if rate > 1e9 else f"{rate:g} req/s"


def _config(campaign: Campaign, trace: Trace | None) -> dict[str, Any]:
    load, lengths, replay = campaign.load, campaign.lengths, campaign.replay
    found: dict[str, Any] = {
        "url": campaign.url,
        "seed, nonce": f"{campaign.seed}, {campaign.nonce}",
    }
    if trace is None:
        found |= {
            "workload": "random",
            "input tokens": "{}-{}".format(*lengths.input_range),
            "output tokens": "{}-{}".format(*lengths.output_range),
            "shared prefix": f"{lengths.prefix_share:.0%} of {lengths.num_prefixes}",
            "burstiness": campaign.burstiness,
        }
    else:
        found |= {
            "workload": f"trace {trace.name}",
            "rows, span": f"{len(trace.rows):,}, {trace.span:,.0f} s",
            "speed": replay.speed,
            "sample": replay.sample,
            "length scale": replay.length_scale,
            "longest prompt, answer": f"{replay.max_input or '-'}, {replay.max_output or '-'}",
            "equal times spread": replay.spread,
        }
    objectives = campaign.objectives
    return found | {
        "requests, duration": f"{load.num_requests or '-'}, {load.duration or '-'} s",
        "warm-up requests": load.warmup,
        "with every request": load.extra,
        "objective TTFT, ms": objectives.ttft * 1e3 or "-",
        f"objective TBT (p{objectives.tbt_percentile:g}), ms": objectives.tbt * 1e3 or "-",
    }


def _environment() -> dict[str, str]:
    return {
        "generator": f"Python {platform.python_version()}, aiohttp {aiohttp.__version__}, "
        f"uvloop {metadata.version('uvloop')}",
        "machine of the generator": f"{platform.system()} {platform.release()} "
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
    }
