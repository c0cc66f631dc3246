"""Decode steps and prefills of an engine's runner, timed as the core runs them."""

import itertools
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from tandem_bench.engine.floor import step_floor
from tandem_bench.gpu.device import Ceilings
from tandem_bench.gpu.lines import Line
from tandem_engine.config import WorkerConfig
from tandem_engine.startup import Startup
from tandem_engine.step import Batch, BatchItem, PendingStep, Runner
from tandem_wire.messages import SamplingParams

if TYPE_CHECKING:
    from tandem_engine.runner.cuda_runner import CudaRunner

STEPS: Final = 60
WARM_STEPS: Final = 5
GREEDY: Final = SamplingParams(max_tokens=1 << 20, temperature=0.0)


def num_pages(num_tokens: int, page_size: int) -> int:
    """How many pages hold this many tokens."""
    return -(-num_tokens // page_size)


def decode_ends(
    runner: Runner, tables: Sequence[list[int]], context: int, steps: int = STEPS
) -> list[float]:
    """When each of `steps` decode steps had ended, one sequence per block table.

    As the core runs them: the next step is launched before the results of the last are read.
    """
    turns = [
        [
            BatchItem(str(row), (5,), context, table, True, GREEDY)
            for row, table in enumerate(tables)
        ]
        for _ in range(2)
    ]
    pending: PendingStep | None = None
    ends: list[float] = []
    for step in range(steps):
        for row, item in enumerate(turns[step % 2]):
            item.start, item.previous = context - 1 + step, row if step else -1
        following = runner.launch(Batch(turns[step % 2]))
        if pending is not None:
            pending.wait()
            ends.append(time.perf_counter())
        pending = following
    assert pending is not None
    pending.wait()
    return ends


def prefill(runner: Runner, tokens: list[int], table: list[int], chunk: int) -> float:
    """Seconds of one prompt in chunks, waiting for each."""
    begin = time.perf_counter()
    for start in range(0, len(tokens), chunk):
        end = min(len(tokens), start + chunk)
        part = tokens[start:end]
        item = BatchItem("p", part, start, table, end == len(tokens), GREEDY, tokens)
        runner.execute(Batch([item]))
    return time.perf_counter() - begin


def prefill_seconds(
    runner: Runner, tokens: list[int], table: list[int], chunk: int, repeats: int = 5
) -> float:
    """Median of several prefills of one prompt, of which the first isn't counted."""
    times = [prefill(runner, tokens, table, chunk) for _ in range(repeats)]
    return statistics.median(times[1:])


def open_runner(
    uri: str, longest: int, budget: int, most: int, startup: Startup, *, graphs: bool = True
) -> "CudaRunner":
    """A runner with random weights, for sequences of at most `longest` tokens and `most` of them.

    Raises:
        ConfigError: it doesn't fit the GPU, or there is none.
    """
    from tandem_engine.load.runner import load_runner
    from tandem_engine.runner.cuda_runner import CudaRunner

    config = WorkerConfig(
        model=uri,
        device="cuda",
        format="Dummy",
        max_model_len=longest,
        max_batched_tokens=budget,
        chunk_tokens=budget,
        max_running=most,
        cuda_graphs=graphs,
    ).resolve_auto({})
    runner = load_runner(config, startup)
    assert isinstance(runner, CudaRunner)
    for layer in runner.kv.cache:
        layer.normal_()
    return runner


class EngineSteps:
    """Times steps of one runner. KV is random, its blocks in random order."""

    def __init__(self, runner: "CudaRunner", ceilings: Ceilings) -> None:
        self.runner = runner
        self.ceilings = ceilings
        self.floor = step_floor(runner.spec)
        self._page = runner.kv.layout.page_size

    def _shuffled(self) -> list[int]:
        return random.sample(range(self.runner.num_blocks), self.runner.num_blocks)

    def _blocks(self, num_tokens: int, free: list[int]) -> list[int]:
        return [free.pop() for _ in range(num_pages(num_tokens, self._page))]

    def fits(self, batch: int, context: int) -> bool:
        """Whether the cache has room for such a batch."""
        return batch * num_pages(context + STEPS + 1, self._page) <= self.runner.num_blocks

    def decode_floor(self, batch: int, context: int) -> float:
        """Seconds of one step."""
        ceilings = self.ceilings
        return self.floor.decode_seconds(batch, context, ceilings.copy, ceilings.matmul)

    def time_decode(self, batch: int, context: int) -> tuple[float, float]:
        """Seconds from step to step, and of the graph alone."""
        free = self._shuffled()
        tables = [self._blocks(context + STEPS + 1, free) for _ in range(batch)]
        ends = decode_ends(self.runner, tables, context)[WARM_STEPS:]
        wall = statistics.mean(after - before for before, after in itertools.pairwise(ends))
        return wall, self.runner.time_decode_graph(batch)

    def time_prefill(self, length: int, chunk: int) -> float:
        """Seconds of one prompt in chunks."""
        tokens = [random.randrange(1000) for _ in range(length)]
        return prefill_seconds(self.runner, tokens, self._blocks(length, self._shuffled()), chunk)

    def decode_lines(self, cases: Sequence[tuple[int, int]]) -> Iterator[Line]:
        """Every (batch, context). Its tokens are checked by the engine's own tests."""
        for batch, context in cases:
            wall, graph = self.time_decode(batch, context)
            waits = f"the GPU waits {100 * max(0.0, 1 - graph / wall):.1f} %"
            name = f"decode {batch} x {context}"
            yield Line(name, wall, self.decode_floor(batch, context), 0.0, waits)

    def prefill_lines(self, cases: Sequence[tuple[int, int]]) -> Iterator[Line]:
        """Every (prompt, chunk)."""
        for length, chunk in cases:
            seconds = self.time_prefill(length, chunk)
            operations = self.floor.prefill_operations(length)
            note = f"{operations / seconds / 1e12:.0f} TFLOP/s"
            name = f"prefill {length} in chunks of {chunk}"
            yield Line(name, seconds, operations / self.ceilings.matmul, 0.0, note)
