"""Decode steps and prefills of the whole engine's runner on a GPU, with random weights.

    python engine/benchmarks/cuda_steps.py [--model llama-8b] [--max-batched-tokens 8192] \
        [--no-cuda-graphs]

A decode step is timed as the core runs it: the next one is launched before the results of the last
are read; beside it the same CUDA graph replayed alone says how long the GPU had to wait. Floors are
weights and KV over the copy bandwidth, or operations over the matmul rate, measured in the same run
(`tandem_kernels.bench.timing`). KV is random, its blocks in random order.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Final

from tandem_bench.engine_steps import EngineSteps, open_runner
from tandem_bench.shapes import model_uri
from tandem_engine.startup import Startup
from tandem_kernels.bench.timing import measure_ceilings

DECODES: Final = ((1, 1024), (32, 1024), (256, 1024), (32, 8192))
"""(sequences, context)."""
PREFILLS: Final = (64, 128, 256, 512, 1024, 8192, 32768)


def main() -> None:
    """Load, print the start's split, time everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--max-batched-tokens", type=int, default=8192)
    parser.add_argument("--no-cuda-graphs", action="store_true")
    arguments = parser.parse_args()
    startup = Startup()
    with tempfile.TemporaryDirectory() as folder:
        uri = model_uri(arguments.model, Path(folder))
        graphs = not arguments.no_cuda_graphs
        budget = arguments.max_batched_tokens
        runner = open_runner(uri, max(PREFILLS), budget, 256, startup, graphs=graphs)
    ceilings = measure_ceilings()
    print(f"{ceilings.device}: copy {ceilings.copy / 1e12:.3f} TB/s,", end=" ")
    print(f"matmul {ceilings.matmul / 1e12:.0f} TFLOP/s; {startup.report().describe()}", flush=True)
    steps = EngineSteps(runner, ceilings)
    for batch, context in DECODES:
        wall, graph = steps.time_decode(batch, context)
        floor = steps.decode_floor(batch, context)
        print(
            f"decode {batch:4d} x {context:5d}: {wall * 1e3:7.3f} ms, floor {floor * 1e3:7.3f} ms,"
            f" {100 * floor / wall:5.1f} %; the GPU waits {100 * max(0.0, 1 - graph / wall):.1f} %",
            flush=True,
        )
    for length in PREFILLS:
        seconds = steps.time_prefill(length, budget)
        rate = steps.floor.prefill_operations(length) / seconds
        print(
            f"prefill {length:6d}: {seconds:.4f} s, {rate / 1e12:.0f} TFLOP/s,"
            f" {100 * rate / ceilings.matmul:.1f} % of the matmul rate",
            flush=True,
        )
    runner.close()


if __name__ == "__main__":
    main()
