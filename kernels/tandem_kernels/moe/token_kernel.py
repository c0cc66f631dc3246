"""The experts of a single token: each weight meets one row, so products stay in registers.

The expert ids say where to read, nothing is sorted, and a program of the second launch sums its
columns over the token's experts.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tandem_kernels.activation.kernel import activate
from tandem_kernels.overlap import launch_options, wait_for_inputs


@triton.jit
def token_gate_up_kernel(
    x,
    weight,
    ids,
    out,
    N,
    K,
    GELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (block of columns, choice): act(x Gᵀ) · (x Uᵀ) of one expert; out [k, N]."""
    wait_for_inputs(PDL)
    choice = tl.program_id(1)
    expert = tl.load(ids + choice).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    read_columns = tl.minimum(columns, N - 1).to(tl.int64)
    steps = tl.arange(0, BLOCK_K)
    size = N.to(tl.int64) * K
    w_at = weight + expert * 2 * size + read_columns[:, None] * K + steps[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    other = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            a = tl.load(x + start + steps, eviction_policy="evict_last").to(tl.float32)
            w = tl.load(w_at + start, eviction_policy="evict_first")
            u = tl.load(w_at + size + start, eviction_policy="evict_first")
        else:
            inside = start + steps < K
            a = tl.load(x + start + steps, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(w_at + start, mask=inside[None, :], other=0.0)
            u = tl.load(w_at + size + start, mask=inside[None, :], other=0.0)
        acc += w.to(tl.float32) * a[None, :]
        other += u.to(tl.float32) * a[None, :]
    found = activate(tl.sum(acc, axis=1), GELU) * tl.sum(other, axis=1)
    tl.store(out + choice * N + columns, found.to(out.dtype.element_ty), mask=columns < N)


@triton.jit
def token_down_kernel(
    x,
    weight,
    weights,
    ids,
    out,
    N,
    K,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: a block of columns, over all of the token's experts; x [k, K]."""
    wait_for_inputs(PDL)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    read_columns = tl.minimum(columns, N - 1).to(tl.int64)
    steps = tl.arange(0, BLOCK_K)
    size = N.to(tl.int64) * K
    turns = tl.cdiv(K, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    # One loop over experts and steps, so that the reads of the next expert start in time.
    for turn in tl.range(0, TOP_K * turns, num_stages=STAGES):
        choice = turn // turns
        start = (turn % turns) * BLOCK_K
        expert = tl.load(ids + choice).to(tl.int64)
        share = tl.load(weights + choice).to(tl.float32)
        w_at = weight + expert * size + read_columns[:, None] * K + start + steps[None, :]
        x_at = x + choice * K + start + steps
        if EVEN_K:
            a = tl.load(x_at).to(tl.float32)
            w = tl.load(w_at, eviction_policy="evict_first")
        else:
            inside = start + steps < K
            a = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(w_at, mask=inside[None, :], other=0.0)
        acc += w.to(tl.float32) * (a * share)[None, :]
    found = tl.sum(acc, axis=1)
    tl.store(out + columns, found.to(out.dtype.element_ty), mask=columns < N)


@dataclass(frozen=True, slots=True)
class VectorTiles:
    """A configuration for one token: for the gate-up launch, then for the down launch."""

    gate_n: int = 4
    gate_k: int = 512
    gate_warps: int = 4
    gate_stages: int = 1
    down_n: int = 4
    down_k: int = 256
    down_warps: int = 4
    down_stages: int = 3
    overlap: int = 0
    """Which launches may start early: 1 the routing, 2 gate-up, 4 down. With both products the
    programs of the second take room from those of the first, which costs more than it saves."""


def token_moe(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    tiles: VectorTiles,
    gelu: bool = False,
    overlap: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`apply_experts` for x [1, C], in two launches."""
    top_k = ids.shape[1]
    _, hidden, intermediate = down.shape
    inner = torch.empty((top_k, intermediate), dtype=x.dtype, device=x.device)
    out = torch.empty_like(x) if out is None else out
    gate_overlap = overlap and bool(tiles.overlap & 2)
    down_overlap = overlap and bool(tiles.overlap & 4)
    token_gate_up_kernel[(triton.cdiv(intermediate, tiles.gate_n), top_k)](
        x,
        gate_up,
        ids,
        inner,
        intermediate,
        hidden,
        GELU=gelu,
        BLOCK_N=tiles.gate_n,
        BLOCK_K=tiles.gate_k,
        EVEN_K=hidden % tiles.gate_k == 0,
        STAGES=tiles.gate_stages,
        PDL=gate_overlap,
        num_warps=tiles.gate_warps,
        **launch_options(gate_overlap),
    )
    token_down_kernel[(triton.cdiv(hidden, tiles.down_n),)](
        inner,
        down,
        weights,
        ids,
        out,
        hidden,
        intermediate,
        TOP_K=top_k,
        BLOCK_N=tiles.down_n,
        BLOCK_K=tiles.down_k,
        EVEN_K=intermediate % tiles.down_k == 0,
        STAGES=tiles.down_stages,
        PDL=down_overlap,
        num_warps=tiles.down_warps,
        **launch_options(down_overlap),
    )
    return out
