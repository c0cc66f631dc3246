"""`tandem bench offline`: the engine in this process."""

import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from tandem_bench.offline.engine_run import OfflineEngine, OfflineResult, check_fits, warm_up
from tandem_bench.offline.published import OfflineWorkload
from tandem_bench.shapes import model_uri
from tandem_cli.bench_failure import parse_lengths, told
from tandem_cli.console import console, results, show_steps
from tandem_cli.errors import CliError
from tandem_engine.config import WorkerConfig, parse_args
from tandem_engine.core.child import load_worker_runner
from tandem_engine.errors import TandemEngineError
from tandem_engine.startup import Startup, process_start
from tandem_wire.model_error import ModelSourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineOptions:
    """The command line as given."""

    model: str
    num_seqs: int
    input_len: str
    output_len: str
    seed: int
    temperature: float
    warmup_seqs: int
    repeats: int
    worker_flags: Sequence[str]


def measure(options: OfflineOptions, json_file: Path | None) -> None:
    """Load, run, print, write."""
    workload = OfflineWorkload(
        num_seqs=options.num_seqs,
        input_range=parse_lengths(options.input_len, "--input-len"),
        output_range=parse_lengths(options.output_len, "--output-len"),
        seed=options.seed,
        temperature=options.temperature,
    )
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder, told():
        try:
            config = build_config(options, model_uri(options.model, Path(folder)))
            found = run_offline(config, workload, options.warmup_seqs, options.repeats)
        except (TandemEngineError, ModelSourceError) as error:
            remedy = getattr(error, "remedy", "")
            raise CliError(
                str(error), remedy or "see `tandem-worker --help` for the flags"
            ) from error
    results.print(render(found))
    if json_file is not None:
        config_shown = {"model": options.model, "worker_flags": list(options.worker_flags)}
        document = {
            "schema": "tandem-bench-offline/1",
            "config": {**config_shown, "repeats": options.repeats, "seed": options.seed},
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "runs": [result.to_json() for result in found],
        }
        json_file.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"wrote {json_file}")


def build_config(options: OfflineOptions, uri: str) -> WorkerConfig:
    """The worker's own flags, with room in the queue for every sequence."""
    config = parse_args(["--model", uri, *options.worker_flags])
    return replace(config, max_waiting=max(config.max_waiting, options.num_seqs))


def run_offline(
    config: WorkerConfig, workload: OfflineWorkload, warmup_seqs: int, repeats: int
) -> list[OfflineResult]:
    """All runs, on one engine."""
    with show_steps() as steps:
        startup = Startup(steps.update, process_start())
        runner = load_worker_runner(config, startup)
        console.print(startup.report().describe(), soft_wrap=True)
        engine = OfflineEngine(config, runner)
        try:
            check_fits(workload, engine)
            sequences = workload.draw(runner.vocab_size)
            warm_up(engine, workload, runner.vocab_size, warmup_seqs)
            found = []
            for number in range(repeats):
                name = "run" if repeats == 1 else f"run {number + 1}"

                def moved(done: int, tokens: int, name: str = name) -> None:
                    steps.update(name, done / len(sequences), f"{tokens:,} tokens")

                found.append(engine.run(sequences, workload.temperature, moved))
                steps.update(name, 1.0, f"{found[-1].output_per_second:,.0f} tok/s")
        finally:
            engine.close()
    return found


def render(found: Sequence[OfflineResult]) -> Table:
    """One column per run."""
    table = Table(box=None, show_header=len(found) > 1, pad_edge=False)
    table.add_column("")
    for number in range(len(found)):
        table.add_column(f"run {number + 1}", justify="right", style="bold")
    rows: list[tuple[str, Callable[[OfflineResult], str]]] = [
        ("output tokens/s", lambda r: f"{r.output_per_second:,.1f}"),
        ("total tokens/s", lambda r: f"{r.total_per_second:,.1f}"),
        ("seconds", lambda r: f"{r.seconds:,.2f}"),
        ("prompt / output tokens", lambda r: f"{r.input_tokens:,} / {r.output_tokens:,}"),
        ("steps", lambda r: f"{r.steps:,}"),
        ("mean batch", lambda r: f"{r.mean_batch:.1f}"),
        ("in steps / scheduling", lambda r: f"{r.runner_share:.1%} / {1 - r.runner_share:.1%}"),
        ("prompt tokens cached", lambda r: f"{r.cached_tokens:,}"),
        ("preemptions", lambda r: f"{r.preemptions:,}"),
        ("first token after", lambda r: f"{r.first_token_seconds:.3f} s"),
    ]
    for name, show in rows:
        table.add_row(name, *(show(result) for result in found))
    return table
