"""Decode steps and prefill of one shape, divided among 1, 2 or more GPUs of a machine.

Random weights in the shape of Llama-3.1-8B. A decode step is the wall time between two steps of
which each is launched before the one before it has ended; a prefill starts on an idle GPU.
"""

import gc
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch

from tandem_bench.engine.runner_steps import STEPS, decode_ends, num_pages, prefill, prefill_seconds
from tandem_bench.gpu.device import require_gpu
from tandem_bench.options import option, parse_numbers
from tandem_bench.shapes import model_uri
from tandem_engine.config import WorkerConfig
from tandem_engine.load.runner import load_runner
from tandem_engine.startup import Startup
from tandem_engine.step import Runner

PAGE: Final = 64
KV_BYTES: Final = 48 << 30
WARM_STEPS: Final = 8
PROMPT: Final = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Decode steps and prefill of Llama-3.1-8B's shape, divided among several GPUs."""

    ranks: str = option("2,1", "Numbers of GPUs, in this order; ratios are to the last.")
    profile: bool = option(
        False, "Also the kernels of the first rank, in one step of each kind.", name="--profile"
    )


def open_runner(uri: str, ranks: int) -> Runner:
    """Graphs are captured as they are needed: three sizes instead of all."""
    config = WorkerConfig(
        model=uri,
        format="Dummy",
        role="prefill",
        device="cuda",
        dtype="BFloat16",
        page_size=PAGE,
        max_model_len=16384,
        max_batched_tokens=8192,
        chunk_tokens=8192,
        kv_memory_bytes=KV_BYTES,
        tensor_parallel=ranks,
    )
    startup = Startup()
    runner = load_runner(config, startup)
    print(f"TP {ranks}: {startup.report().describe()}; {runner.num_blocks} blocks", flush=True)
    return runner


def block_tables(runner: Runner, batch: int, context: int) -> list[list[int]]:
    """One per sequence, in random order."""
    width = num_pages(context + STEPS + WARM_STEPS, PAGE)
    order = random.Random(0).sample(range(runner.num_blocks), batch * width)
    return [order[row * width : (row + 1) * width] for row in range(batch)]


def print_profile(title: str, run: Callable[[], object]) -> None:
    """Print milliseconds by kernel of the first rank; waiting for others is in the collectives."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.device_time_total)[:12]
    print(f"  profile of {title}:")
    for row in rows:
        print(f"    {row.device_time_total / 1e3:9.3f} ms  {row.count:5d} x  {row.key[:70]}")


def measure(runner: Runner, ranks: int, *, profiled: bool) -> dict[str, float]:
    """Milliseconds by what was measured."""
    found = {}
    for batch in (1, 32, 256):
        tables = block_tables(runner, batch, 1024)
        ends = decode_ends(runner, tables, 1024)[WARM_STEPS - 1 :]
        gaps = [later - sooner for sooner, later in pairwise(ends)]
        found[f"decode {batch} x 1k"] = 1e3 * statistics.median(gaps)
        if profiled:
            steps = partial(decode_ends, runner, tables, 1024, 10)
            print_profile(f"10 steps of {batch} x 1k", steps)
    tokens = [number % 1000 for number in range(PROMPT)]
    table = random.Random(1).sample(range(runner.num_blocks), num_pages(PROMPT, PAGE))
    found["prefill 8k"] = 1e3 * prefill_seconds(runner, tokens, table, PROMPT, repeats=6)
    if profiled:
        print_profile("a prefill of 8k", partial(prefill, runner, tokens, table, PROMPT))
    for name, value in found.items():
        print(f"TP {ranks}: {name:16} {value:9.3f} ms", flush=True)
    return found


def run(options: Options) -> None:
    """Measure every degree in turn and print the ratios to the last."""
    degrees = parse_numbers(options.ranks, "--ranks")
    require_gpu()
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        uri = model_uri("llama-8b", Path(directory))
        for ranks in degrees:
            runner = open_runner(uri, ranks)
            results[ranks] = measure(runner, ranks, profiled=options.profile)
            runner.close()
            del runner
            gc.collect()
            torch.cuda.empty_cache()
    base = results[degrees[-1]]
    for name, value in base.items():
        row = "  ".join(f"TP {n} {found[name]:8.3f} ms" for n, found in results.items())
        best = results[degrees[0]][name]
        print(f"{name:16} {row}  ratio {value / best:.2f}")
