"""The engine in this process, from options to table and file."""

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
from tandem_bench.options import json_option, option, parse_lengths, required, rest
from tandem_bench.shapes import model_uri
from tandem_bench.terminal import Bars, notes, results
from tandem_engine.config import WorkerConfig, parse_args
from tandem_engine.core.child import load_worker_runner
from tandem_engine.startup import Startup, process_start


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The engine in this process, without HTTP: nano-vllm's published 256 sequences.

    Every other flag goes to the worker (`tandem-worker --help`):

        tandem bench offline --model llama-8b --format Dummy --dtype BFloat16 --device cuda
    """

    model: str = required("Model URI, or a short name as of `bench step` (--format Dummy).")
    num_seqs: int = option(256, "Sequences, all submitted at once.")
    input_len: str = option(
        "100-1024", "Tokens; a range is drawn from uniformly.", metavar="N|LOW-HIGH"
    )
    output_len: str = option(
        "100-1024", "Tokens; a range is drawn from uniformly.", metavar="N|LOW-HIGH"
    )
    seed: int = option(0, "Seed of lengths and prompts.")
    temperature: float = option(0.6, "0 is greedy.")
    warmup_seqs: int = option(32, "Sequences run first, a few tokens each, not counted.", minimum=0)
    repeats: int = option(1, "Runs; all are printed.", minimum=1)
    json_file: Path | None = json_option()
    worker_flags: tuple[str, ...] = rest("Flags of tandem-worker.")


def run(options: Options) -> None:
    """Load, run, print, write."""
    workload = OfflineWorkload(
        num_seqs=options.num_seqs,
        input_range=parse_lengths(options.input_len, "--input-len"),
        output_range=parse_lengths(options.output_len, "--output-len"),
        seed=options.seed,
        temperature=options.temperature,
    )
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        config = build_config(options, model_uri(options.model, Path(folder)))
        found = run_offline(config, workload, options.warmup_seqs, options.repeats)
    results.print(render(found))
    if options.json_file is not None:
        config_shown = {"model": options.model, "worker_flags": list(options.worker_flags)}
        document = {
            "schema": "tandem-bench-offline/1",
            "config": {**config_shown, "repeats": options.repeats, "seed": options.seed},
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "runs": [result.to_json() for result in found],
        }
        options.json_file.write_text(json.dumps(document, indent=1) + "\n")
        notes.print(f"wrote {options.json_file}")


def build_config(options: Options, uri: str) -> WorkerConfig:
    """The worker's own flags, with room in the queue for every sequence."""
    config = parse_args(["--model", uri, *options.worker_flags])
    return replace(config, max_waiting=max(config.max_waiting, options.num_seqs))


def run_offline(
    config: WorkerConfig, workload: OfflineWorkload, warmup_seqs: int, repeats: int
) -> list[OfflineResult]:
    """All runs, on one engine."""
    with Bars() as bars:
        startup = Startup(bars.update, process_start())
        runner = load_worker_runner(config, startup)
        notes.print(startup.report().describe(), soft_wrap=True)
        engine = OfflineEngine(config, runner)
        try:
            check_fits(workload, engine)
            sequences = workload.draw(runner.vocab_size)
            warm_up(engine, workload, runner.vocab_size, warmup_seqs)
            found = []
            for number in range(repeats):
                name = "run" if repeats == 1 else f"run {number + 1}"

                def moved(done: int, tokens: int, name: str = name) -> None:
                    bars.update(name, done / len(sequences), f"{tokens:,} tokens")

                found.append(engine.run(sequences, workload.temperature, moved))
                bars.update(name, 1.0, f"{found[-1].output_per_second:,.0f} tok/s")
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
