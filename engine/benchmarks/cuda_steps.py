"""Decode steps and prefills of the whole engine's runner on a GPU, with random weights.

    python engine/benchmarks/cuda_steps.py [--model llama-8b] [--max-batched-tokens 8192] \
        [--no-cuda-graphs]

A decode step is timed as the core runs it: the next one is launched before the results of the last
are read; beside it the same CUDA graph replayed alone says how long the GPU had to wait. Floors are
weights and KV over the copy bandwidth, or operations over the matmul rate, measured in the same run
(`tandem_kernels.bench.timing`). KV is random, its blocks in random order.
"""

import argparse
import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

from tandem_bench.shapes import model_uri
from tandem_engine.config import WorkerConfig
from tandem_engine.runner.base import Batch, BatchItem, PendingStep
from tandem_engine.runner.cuda_runner import CudaRunner
from tandem_engine.runner.model_runner import load_runner
from tandem_engine.startup import Startup
from tandem_kernels.bench.timing import Ceilings, measure_ceilings
from tandem_wire.messages import SamplingParams

DECODES: Final = ((1, 1024), (32, 1024), (256, 1024), (32, 8192))
"""(sequences, context)."""
PREFILLS: Final = (64, 128, 256, 512, 1024, 8192, 32768)
STEPS: Final = 60
GREEDY: Final = SamplingParams(max_tokens=1 << 20, temperature=0.0)


class Model:
    """A runner and what its floors are computed from."""

    def __init__(self, runner: CudaRunner, ceilings: Ceilings) -> None:
        self.runner = runner
        self.ceilings = ceilings
        self.page = runner.kv.layout.page_size
        self.spec = runner.spec
        heads = (2 * self.spec.num_heads + 2 * self.spec.num_kv_heads) * self.spec.head_dim
        layer = self.spec.hidden_size * (heads + 3 * self.spec.intermediate_size)
        self.layer_weights = self.spec.num_layers * layer
        self.weights = self.layer_weights + self.spec.vocab_size * self.spec.hidden_size

    def blocks(self, num_tokens: int, taken: list[int]) -> list[int]:
        """The next blocks of `taken` for so many tokens."""
        return [taken.pop() for _ in range(-(-num_tokens // self.page))]

    def shuffled(self) -> list[int]:
        """All blocks."""
        return random.sample(range(self.runner.num_blocks), self.runner.num_blocks)

    def decode_floor(self, batch: int, context: int) -> float:
        """Seconds of one step."""
        reading = 2 * self.weights / self.ceilings.copy
        multiplying = 2 * self.weights * batch / self.ceilings.matmul
        kv = self.runner.kv.layout.block_bytes / self.page * batch * context
        return max(reading, multiplying) + kv / self.ceilings.copy

    def prefill_operations(self, length: int) -> float:
        """Multiplications and additions of one prompt."""
        attention = 2 * self.spec.num_layers * self.spec.num_heads * self.spec.head_dim * length**2
        return 2 * self.layer_weights * length + attention


def time_decode(model: Model, batch: int, context: int) -> tuple[float, float]:
    """Seconds from step to step, and of the graph alone."""
    runner, free = model.runner, model.shuffled()
    tables = [model.blocks(context + STEPS + 1, free) for _ in range(batch)]
    turns = [
        [BatchItem(str(row), (5,), context, tables[row], True, GREEDY) for row in range(batch)]
        for _ in range(2)
    ]
    pending: PendingStep | None = None
    ends: list[float] = []
    for step in range(STEPS):
        for row, item in enumerate(turns[step % 2]):
            item.start, item.previous = context - 1 + step, row if step else -1
        following = runner.launch(Batch(turns[step % 2]))
        if pending is not None:
            pending.wait()
            ends.append(time.perf_counter())
        pending = following
    assert pending is not None
    pending.wait()
    wall = statistics.mean(after - before for before, after in itertools.pairwise(ends[5:]))
    return wall, runner.time_decode_graph(batch)


def time_prefill(model: Model, length: int, chunk: int) -> float:
    """Seconds of one prompt in chunks, waiting for each."""
    table = model.blocks(length, model.shuffled())
    tokens = [random.randrange(1000) for _ in range(length)]
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for start in range(0, length, chunk):
            end = min(length, start + chunk)
            item = BatchItem("p", tokens[start:end], start, table, end == length, GREEDY, tokens)
            model.runner.execute(Batch([item]))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def main() -> None:
    """Load, print the start's split, time everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--max-batched-tokens", type=int, default=8192)
    parser.add_argument("--no-cuda-graphs", action="store_true")
    arguments = parser.parse_args()
    startup = Startup()
    with tempfile.TemporaryDirectory() as folder:
        config = WorkerConfig(
            model=model_uri(arguments.model, Path(folder)),
            device="cuda",
            format="Dummy",
            max_model_len=max(PREFILLS),
            max_batched_tokens=arguments.max_batched_tokens,
            cuda_graphs=not arguments.no_cuda_graphs,
        ).resolve_auto({})
        runner = load_runner(config, startup)
    assert isinstance(runner, CudaRunner)
    ceilings = measure_ceilings()
    print(f"{ceilings.device}: copy {ceilings.copy / 1e12:.3f} TB/s,", end=" ")
    print(f"matmul {ceilings.matmul / 1e12:.0f} TFLOP/s; {startup.report().describe()}", flush=True)
    for layer in runner.kv.cache:
        layer.normal_()
    model = Model(runner, ceilings)
    for batch, context in DECODES:
        wall, graph = time_decode(model, batch, context)
        floor = model.decode_floor(batch, context)
        print(
            f"decode {batch:4d} x {context:5d}: {wall * 1e3:7.3f} ms, floor {floor * 1e3:7.3f} ms,"
            f" {100 * floor / wall:5.1f} %; the GPU waits {100 * max(0.0, 1 - graph / wall):.1f} %",
            flush=True,
        )
    for length in PREFILLS:
        seconds = time_prefill(model, length, arguments.max_batched_tokens)
        rate = model.prefill_operations(length) / seconds
        print(
            f"prefill {length:6d}: {seconds:.4f} s, {rate / 1e12:.0f} TFLOP/s,"
            f" {100 * rate / ceilings.matmul:.1f} % of the matmul rate",
            flush=True,
        )
    runner.close()


if __name__ == "__main__":
    main()
