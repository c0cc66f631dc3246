"""How a step's decode attention is cut into units of about equal size, on the device.

Whole sequences are too few programs at small batches, and too uneven at large ones. A plan cuts
each sequence's keys into splits of at most `chunk` tiles. A split of one sequence is a unit, and
the attention kernel's grid is (KV heads, an upper bound of the units), whatever the lengths. All
numbers stay in device memory, so one CUDA graph serves every mix of lengths. The idea comes from
the schedulers of FlashInfer and FlashMLA.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tandem_kernels.tuning import tuned_decode

UNIT_FIELDS = 5
"""A unit's fields: request (-1: none), first position, end, the request's units, the first one."""


@triton.jit(do_not_specialize=["batch", "num_units", "target"])
def plan_kernel(
    lengths,
    units,
    requests,
    batch,
    num_units,
    target,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Every program computes the whole plan and writes BLOCK_U units of it."""
    rows = tl.arange(0, BLOCK_B)
    length = tl.load(lengths + rows, mask=rows < batch, other=0)
    first = tl.zeros_like(length)
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // TILE
    tiles = (length + TILE - 1) // TILE - first
    total = tl.sum(tiles, axis=0)
    chunk = tl.maximum((total + target - 1) // target, MIN_TILES)
    # A length of 0 (padding of a graph's batch) still gets a unit, which writes zeros.
    splits = tl.where(rows < batch, tl.maximum((tiles + chunk - 1) // chunk, 1), 0)
    ends = tl.cumsum(splits, axis=0)
    if tl.program_id(0) == 0:
        tl.store(requests + rows * 2, ends - splits, mask=rows < batch)
        tl.store(requests + rows * 2 + 1, splits, mask=rows < batch)
    unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    request = tl.sum((ends[None, :] <= unit[:, None]).to(tl.int32), axis=1)
    chosen = request[:, None] == rows[None, :]
    count = tl.maximum(tl.sum(tl.where(chosen, splits[None, :], 0), axis=1), 1)
    begin = tl.sum(tl.where(chosen, (ends - splits)[None, :], 0), axis=1)
    width = tl.sum(tl.where(chosen, tiles[None, :], 0), axis=1)
    base = tl.sum(tl.where(chosen, first[None, :], 0), axis=1)
    last = tl.sum(tl.where(chosen, length[None, :], 0), axis=1)
    index = unit - begin
    start = (base + index * width // count) * TILE
    end = tl.minimum((base + (index + 1) * width // count) * TILE, last)
    row = units + unit * 5
    inside = unit < num_units
    tl.store(row, tl.where(request < batch, request, -1), mask=inside)
    tl.store(row + 1, start, mask=inside)
    tl.store(row + 2, end, mask=inside)
    tl.store(row + 3, count, mask=inside)
    tl.store(row + 4, begin, mask=inside)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Buffers of one (batch, window), made once and refilled for every step by `refill`.

    Legend: B sequences, H query heads, D head dimension, U = B + target units.
    """

    lengths: torch.Tensor  # [B] int32: existing positions, including the step's own; 0: padding
    block_tables: torch.Tensor  # [B, M] int32
    units: torch.Tensor  # [U, 5] int32
    requests: torch.Tensor  # [B, 2] int32: first unit, number of units
    partial_out: torch.Tensor  # [U, H, D] float32
    partial_lse: torch.Tensor  # [U, H] float32, base 2
    arrivals: torch.Tensor  # [B, K] int32, zero between launches
    window: int  # 0: none
    tile: int  # positions per tile
    target: int  # the number of units aimed at, beyond one per sequence
    min_tiles: int
    stages: int | None = None
    """Of the attention kernel's pipeline; None: its own choice. So is the next one."""
    fused: bool | None = None
    """Whether that kernel merges splits itself."""

    def refill(self) -> None:
        """Make the plan for the current `lengths`, in one launch, which may be captured."""
        batch, num_units = self.lengths.shape[0], self.units.shape[0]
        block_u = 16
        plan_kernel[(triton.cdiv(num_units, block_u),)](
            self.lengths,
            self.units,
            self.requests,
            batch,
            num_units,
            self.target,
            WINDOW=self.window,
            TILE=self.tile,
            MIN_TILES=self.min_tiles,
            BLOCK_B=max(16, triton.next_power_of_2(batch)),
            BLOCK_U=block_u,
        )


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 264
    return torch.cuda.get_device_properties(device).multi_processor_count


def make_decode_plan(
    lengths: torch.Tensor,
    block_tables: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    window: int | None = None,
    tile: int = 64,
    programs: int | None = None,
    min_tiles: int = 1,
) -> DecodePlan:
    """Allocate a plan for these (long-lived) tensors.

    Args:
        lengths: [B] int32.
        block_tables: [B, M] int32.
        tile: positions per tile; must divide the page size, or be a multiple of it.
        programs: the number of programs to aim at, over all KV heads; None: what was measured for
            this device, or one per multiprocessor.
        min_tiles: the smallest split, in tiles.
    """
    batch, device = lengths.shape[0], lengths.device
    stages: int | None = None
    fused: bool | None = None
    if programs is None:
        # The kernel that was measured has tiles of 64 positions, of 16 bits each number.
        tuned = tuned_decode(batch, num_heads, num_kv_heads, head_dim) if tile == 64 else None
        programs = tuned[0] if tuned else _multiprocessors(device)
        stages, fused = (tuned[1], bool(tuned[2])) if tuned else (None, None)
    target = max(1, programs // num_kv_heads)
    num_units = batch + target
    return DecodePlan(
        lengths=lengths,
        block_tables=block_tables,
        units=torch.full((num_units, UNIT_FIELDS), -1, dtype=torch.int32, device=device),
        requests=torch.zeros((batch, 2), dtype=torch.int32, device=device),
        partial_out=torch.empty(
            (num_units, num_heads, head_dim), dtype=torch.float32, device=device
        ),
        partial_lse=torch.empty((num_units, num_heads), dtype=torch.float32, device=device),
        arrivals=torch.zeros((batch, num_kv_heads), dtype=torch.int32, device=device),
        window=window or 0,
        tile=tile,
        target=target,
        min_tiles=min_tiles,
        stages=stages,
        fused=fused,
    )
