"""Decode steps and prefill of one shape, divided among 1, 2 or more GPUs of a machine.

    python engine/benchmarks/tensor_parallel.py [--ranks 2 1] [--profile]

Random weights in the shape of Llama-3.1-8B. A decode step is the wall time between two steps of
which each is launched before the one before it has ended; a prefill starts on an idle GPU.
`--profile` adds what the first rank's kernels took in one step of each kind.
"""

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from tandem_bench.shapes import model_uri
from tandem_engine.config import WorkerConfig
from tandem_engine.load.runner import load_runner
from tandem_engine.startup import Startup
from tandem_engine.step import Batch, BatchItem, PendingStep, Runner
from tandem_wire.messages import SamplingParams

PAGE = 64
GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0)
KV_BYTES = 48 << 30
STEPS = 60
WARM_STEPS = 8


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


def decode_steps(runner: Runner, batch: int, context: int, steps: int) -> list[float]:
    """Times at which steps had been launched, each before the results of the last were read."""
    width = -(-(context + STEPS + WARM_STEPS) // PAGE)
    order = random.Random(0).sample(range(runner.num_blocks), batch * width)
    tables = [order[row * width : (row + 1) * width] for row in range(batch)]
    pending: PendingStep | None = None
    times = []
    for step in range(steps):
        items = [
            BatchItem(
                rid=str(row),
                tokens=(5,),
                start=context + step - 1,
                block_table=tables[row],
                sample=True,
                params=GREEDY,
                previous=row if step else -1,
            )
            for row in range(batch)
        ]
        launched = runner.launch(Batch(items))
        if pending is not None:
            pending.wait()
        pending = launched
        times.append(time.perf_counter())
    assert pending is not None
    pending.wait()
    return times


def prefill(runner: Runner, length: int, chunk: int) -> None:
    """One prompt from its first token to its first answer."""
    blocks = random.Random(1).sample(range(runner.num_blocks), -(-length // PAGE))
    tokens = [number % 1000 for number in range(length)]
    for start in range(0, length, chunk):
        end = min(length, start + chunk)
        item = BatchItem("p", tokens[start:end], start, blocks, end == length, GREEDY)
        runner.execute(Batch([item]))


def print_profile(title: str, run: Callable[[], object]) -> None:
    """Milliseconds by kernel of the first rank; what waits for the others is in the collectives."""
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
        times = decode_steps(runner, batch, 1024, STEPS)[WARM_STEPS:]
        gaps = [later - sooner for sooner, later in pairwise(times)]
        found[f"decode {batch} x 1k"] = 1e3 * statistics.median(gaps)
        if profiled:
            steps = partial(decode_steps, runner, batch, 1024, 10)
            print_profile(f"10 steps of {batch} x 1k", steps)
    prefill(runner, 8192, 8192)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        prefill(runner, 8192, 8192)
        times.append(time.perf_counter() - began)
    found["prefill 8k"] = 1e3 * statistics.median(times)
    if profiled:
        print_profile("a prefill of 8k", partial(prefill, runner, 8192, 8192))
    for name, value in found.items():
        print(f"TP {ranks}: {name:16} {value:9.3f} ms", flush=True)
    return found


def main() -> None:
    """Measure every degree in turn and print the ratios to the last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        uri = model_uri("llama-8b", Path(directory))
        for ranks in arguments.ranks:
            runner = open_runner(uri, ranks)
            results[ranks] = measure(runner, ranks, profiled=arguments.profile)
            runner.close()
            del runner
            gc.collect()
            torch.cuda.empty_cache()
    base = results[arguments.ranks[-1]]
    for name, value in base.items():
        row = "  ".join(f"TP {n} {found[name]:8.3f} ms" for n, found in results.items())
        best = results[arguments.ranks[0]][name]
        print(f"{name:16} {row}  ratio {value / best:.2f}")


if __name__ == "__main__":
    main()
