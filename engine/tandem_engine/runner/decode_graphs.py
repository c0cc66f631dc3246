"""CUDA graphs of functions of a batch size, one per padded size. Decode steps, above all."""

import logging
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)


def padded_sizes(most: int) -> list[int]:
    """Batch sizes, up to `most`, that decode steps are padded to."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, most, 16)]
    return [size for size in sizes if size < most] + [most]


class DecodeGraphs:
    """Graphs of `run(size)`, captured when first needed or all at once.

    All share one memory pool, so `run` must leave its results in tensors made elsewhere. Larger
    graphs are captured first, so that smaller ones reuse their memory.

    Args:
        run: a step of `size` rows. It may only touch tensors at fixed addresses.
        sizes: sizes of the graphs, ascending.
        pool: the graphs' memory, which other graphs may use between steps.
        enabled: if false, `replay` calls `run` without a graph.
    """

    def __init__(
        self, run: Callable[[int], None], sizes: list[int], pool: Any, *, enabled: bool = True
    ) -> None:
        self.sizes = sizes
        self._run = run
        self._enabled = enabled
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = pool

    def size_for(self, count: int) -> int:
        """The smallest padded size that holds `count` sequences."""
        return self.sizes[bisect_left(self.sizes, count)]

    def replay(self, size: int) -> None:
        """Run a step of `size` rows, one of `sizes`."""
        if size in self._graphs:
            self._graphs[size].replay()
        elif self._enabled:
            self._capture(size)
        else:
            self._run(size)

    def capture_all(self, progress: Callable[[float], None]) -> None:
        """Capture every size now. This runs steps, so the inputs must be padding."""
        if not self._enabled:
            return
        for done, size in enumerate(reversed(self.sizes)):
            self._capture(size)
            progress((done + 1) / len(self.sizes))

    def clear(self) -> None:
        """Forget all graphs; a size that is needed again is captured again."""
        self._graphs.clear()

    def _capture(self, size: int) -> None:
        """Run a step once (a second run would start from its tokens), then capture it."""
        # Kernels must be compiled and loaded, and libraries make workspaces, outside the graph.
        self._run(size)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # The hand-off's threads use the device at the same time.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._run(size)
        self._graphs[size] = graph
        log.debug("captured a decode graph of %d rows", size)
