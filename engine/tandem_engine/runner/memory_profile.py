"""How much of a GPU's memory is left for the KV cache, measured before the cache is made."""

from dataclasses import dataclass
from typing import Final

import torch

from tandem_engine.errors import ConfigError
from tandem_engine.runner.cuda_runner import CudaRunner
from tandem_engine.runner.probe_steps import small_batches, worst_batch

_PER_GRAPH: Final = 12 * 2**20
"""Bytes that a captured graph holds besides its share of the pool, measured on an H100."""
_RESERVE: Final = 256 * 2**20
"""Bytes for the allocator's gaps and the libraries' workspaces."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the bytes of one GPU go."""

    total: int
    allowed: int  # of the total, for everything
    others: int  # in use by other processes and by CUDA itself
    held: int  # weights and buffers
    activations: int  # the most that a step needs on top of that
    graphs: int

    @property
    def kv(self) -> int:
        """Bytes left for the KV cache."""
        return self.allowed - self.others - self.held - self.activations - self.graphs - _RESERVE

    def check(self, wanted: int) -> None:
        """Raise ConfigError, saying where the memory goes, unless `wanted` bytes of KV fit."""
        if self.kv < wanted:
            gib = 2**30
            raise ConfigError(
                f"KV needs {wanted / gib:.2f} GiB of GPU memory, but {self.kv / gib:.2f} are left: "
                f"of {self.total / gib:.1f}, --gpu-memory-percent allows {self.allowed / gib:.1f}, "
                f"weights take {self.held / gib:.1f}, a step {self.activations / gib:.1f}, graphs "
                f"{self.graphs / gib:.1f}, other processes {self.others / gib:.1f}; raise "
                "--gpu-memory-percent, or lower --max-batched-tokens or --max-model-len"
            )


def measure_memory(
    runner: CudaRunner, *, percent: int, max_tokens: int, graphs: bool
) -> MemoryPlan:
    """Run the worst step on a runner that has next to no KV cache, and see what it takes.

    Args:
        runner: has no graphs itself.
        percent: share of the GPU's memory that may be used.
        max_tokens: of a step.
        graphs: whether the real runner has graphs.
    """
    device, max_running = runner.kv.cache.device, runner.max_running
    for batch in small_batches():
        runner.execute(batch)
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner.execute(worst_batch(max_tokens, max_running, runner.max_model_len))
    activations = torch.cuda.max_memory_allocated(device) - held
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    num_graphs = runner.num_graphs if graphs else 0
    # All graphs share one pool, which is as large as the largest one needs.
    rows = max([max_running, *runner.prompt_sizes])
    return MemoryPlan(
        total=total,
        allowed=total * percent // 100,
        others=total - free - torch.cuda.memory_reserved(device),
        held=held,
        activations=activations,
        graphs=num_graphs * _PER_GRAPH + activations * rows // max(max_tokens, rows),
    )
