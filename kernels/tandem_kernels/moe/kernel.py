"""Experts' matrix products over sorted pairs, and the sum over a token's experts.

Two launches of one kernel: gate and up with the activation, from tokens to sorted rows, then down,
from sorted rows to one weighted row per (token, choice), which a third kernel adds up in float32.
A program owns one block of an expert's pairs, a block of columns and all of K: nothing is reduced
across programs. A single token has kernels of its own (`token_kernel.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tandem_kernels.activation.kernel import activate
from tandem_kernels.moe.plan_kernel import ExpertPlan, make_plan, plan_given
from tandem_kernels.moe.route_kernel import route
from tandem_kernels.moe.routing import Routing
from tandem_kernels.moe.token_kernel import VectorTiles, token_moe
from tandem_kernels.overlap import launch_options, wait_for_inputs
from tandem_kernels.tuning import tuned_moe

MOST_OVERLAPPED = 64
"""Launches may start early up to this many tokens: with more, the launch itself costs little."""


@triton.jit
def expert_tile(
    x,
    weight,
    weights,
    order,
    out,
    expert,
    start_place,
    count,
    first_column,
    N,
    K,
    stride_x,
    TMA: tl.constexpr,
    TOP_K: tl.constexpr,
    GATE: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    STREAM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`count` pairs from `start_place` on against BLOCK_N columns of one expert.

    With TMA `weight` is a descriptor of all experts' rows; what it reads past an expert's last row
    ends in columns that are not stored.
    """
    places = start_place + tl.arange(0, BLOCK_M)
    real = tl.arange(0, BLOCK_M) < count
    columns = first_column + tl.arange(0, BLOCK_N)
    read_columns = tl.minimum(columns, N - 1).to(tl.int64)
    steps = tl.arange(0, BLOCK_K)
    pairs = tl.load(order + places, mask=real, other=0)
    rows = pairs // TOP_K if GATE else places
    x_at = x + rows.to(tl.int64)[:, None] * stride_x + steps[None, :]
    size = N.to(tl.int64) * K
    if TMA:
        row = (expert * N * (2 if GATE else 1) + first_column).to(tl.int32)
    else:
        w_at = weight + expert * (2 if GATE else 1) * size
        w_at += read_columns[:, None] * K + steps[None, :]
    evict: tl.constexpr = "evict_first" if STREAM else ""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    other = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = (start + steps < K)[None, :]
        if EVEN_K:
            a = tl.load(x_at + start, mask=real[:, None], other=0.0)
        else:
            a = tl.load(x_at + start, mask=real[:, None] & inside, other=0.0)
        if TMA:
            w = weight.load([row, start])
        elif EVEN_K:
            w = tl.load(w_at + start, eviction_policy=evict)
        else:
            w = tl.load(w_at + start, mask=inside, other=0.0)
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
        if GATE:
            if TMA:
                u = weight.load([row + N, start])
            elif EVEN_K:
                u = tl.load(w_at + size + start, eviction_policy=evict)
            else:
                u = tl.load(w_at + size + start, mask=inside, other=0.0)
            other = tl.dot(a, tl.trans(u), other, input_precision="ieee")
    if GATE:
        acc = activate(acc, GELU) * other
        into = places
    else:
        acc = acc * tl.load(weights + pairs, mask=real, other=0.0).to(tl.float32)[:, None]
        into = pairs
    at = out + into.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=real[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["most"])
def expert_gemm_kernel(
    x,
    weight,
    weights,
    order,
    blocks,
    out,
    N,
    K,
    most,
    stride_x,
    TMA: tl.constexpr,
    TOP_K: tl.constexpr,
    GATE: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    STREAM: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: (block of pairs, block of columns), GROUP blocks of pairs side by side.

    GATE: x are tokens, weight [E, 2 N, K], out sorted rows. Else: x are sorted rows, weight
    [E, N, K], out rows of pairs, times the pair's weight. TMA: weight is a descriptor of its rows.
    """
    wait_for_inputs(PDL)
    across = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * across)
    side = tl.minimum(most - group * GROUP, GROUP)
    inner = program % (GROUP * across)
    block = group * GROUP + inner % side
    count = tl.load(blocks + 2 * most + block)
    if count == 0:
        return
    expert = tl.load(blocks + block).to(tl.int64)
    place = tl.load(blocks + most + block)
    column = (inner // side) * BLOCK_N
    half: tl.constexpr = BLOCK_M // 2
    if BLOCK_M > 64:
        # An expert's last block is often short; the matrix units' tiles have 64 rows.
        if count <= half:
            expert_tile(
                x, weight, weights, order, out, expert, place, count, column, N, K, stride_x, TMA,
                TOP_K, GATE, GELU, half, BLOCK_N, BLOCK_K, EVEN_K, STREAM, STAGES,
            )  # fmt: skip
        else:
            expert_tile(
                x, weight, weights, order, out, expert, place, count, column, N, K, stride_x, TMA,
                TOP_K, GATE, GELU, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, STREAM, STAGES,
            )  # fmt: skip
    else:
        expert_tile(
            x, weight, weights, order, out, expert, place, count, column, N, K, stride_x, TMA,
            TOP_K, GATE, GELU, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, STREAM, STAGES,
        )  # fmt: skip


@triton.jit
def sum_kernel(x, out, size, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (block of columns, token): the sum of TOP_K rows in float32."""
    wait_for_inputs(PDL)
    token = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    at = x + token * TOP_K * size + columns
    found = tl.zeros([BLOCK], tl.float32)
    for turn in tl.static_range(TOP_K):
        found += tl.load(at + turn * size, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * size + columns, found.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class ProductTiles:
    """A configuration of one of the two products."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 1
    """The number of blocks of pairs that are neighbours in the order of programs."""
    tma: int = 0
    """1: the copy engine reads the weights (Hopper; rows of a multiple of 16 bytes)."""


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """A configuration for more than one token; both products share the blocks of pairs."""

    block_m: int
    gate_up: ProductTiles
    down: ProductTiles


def default_tiles(tokens: int, top_k: int, num_experts: int, dtype: torch.dtype) -> ExpertTiles:
    """A configuration that does well for most shapes, for those that were not tuned."""
    pairs_each = tokens * top_k / num_experts
    if dtype == torch.float32:
        # Products of float32 are done without matrix units; large tiles would not fit.
        return ExpertTiles(16, ProductTiles(32, 32, 4, 2), ProductTiles(32, 32, 4, 2))
    if pairs_each <= 12:
        return ExpertTiles(16, ProductTiles(32, 256, 4, 3), ProductTiles(64, 128, 4, 3))
    if pairs_each <= 28:
        return ExpertTiles(32, ProductTiles(64, 128, 4, 3), ProductTiles(64, 128, 4, 3))
    if pairs_each <= 96:
        return ExpertTiles(64, ProductTiles(128, 64, 8, 4), ProductTiles(128, 64, 8, 4))
    return ExpertTiles(128, ProductTiles(128, 64, 8, 3, 8), ProductTiles(256, 64, 8, 3, 8))


def tiles_of(entry: Mapping[str, Sequence[int]]) -> ExpertTiles | VectorTiles:
    """The configuration in an entry of a file in `tuned/`."""
    if "vector" in entry:
        return VectorTiles(*entry["vector"])
    (block_m,) = entry["block_m"]
    return ExpertTiles(block_m, ProductTiles(*entry["gate_up"]), ProductTiles(*entry["down"]))


def tiles_for(
    tokens: int, top_k: int, gate_up: torch.Tensor, down: torch.Tensor
) -> ExpertTiles | VectorTiles:
    """The tuned configuration for this device, or the default; a single token takes vectors."""
    num_experts, hidden, intermediate = down.shape
    found = None
    if down.element_size() == 2 and down.is_cuda:
        found = tuned_moe(tokens, num_experts, top_k, intermediate, hidden)
    if found is not None:
        return tiles_of(found)
    if tokens == 1:
        return VectorTiles()
    return default_tiles(tokens, top_k, num_experts, down.dtype)


def run_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: ExpertPlan,
    out: torch.Tensor,
    block_m: int,
    tiles: ProductTiles,
    gate: bool,
    gelu: bool = False,
    overlap: bool = False,
) -> None:
    """One launch of `expert_gemm_kernel`, for a plan made with `block_m`."""
    columns, size = out.shape[-1], x.shape[-1]
    most = plan.blocks.shape[1]
    rows = weight
    if tiles.tma:
        rows = TensorDescriptor.from_tensor(weight.view(-1, size), [tiles.block_n, tiles.block_k])
    expert_gemm_kernel[(most * triton.cdiv(columns, tiles.block_n),)](
        x,
        rows,
        plan.weights,
        plan.order,
        plan.blocks,
        out,
        columns,
        size,
        most,
        x.stride(0),
        TMA=bool(tiles.tma),
        TOP_K=plan.weights.shape[1],
        GATE=gate,
        GELU=gelu,
        BLOCK_M=block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        GROUP=tiles.group,
        EVEN_K=size % tiles.block_k == 0,
        STREAM=block_m < 64,
        STAGES=tiles.stages,
        PDL=overlap,
        num_warps=tiles.warps,
        **launch_options(overlap),
    )


def sum_pairs(pairs: torch.Tensor, out: torch.Tensor, top_k: int, overlap: bool = False) -> None:
    """Write to out [T, C] the sum of every `top_k` rows of pairs [T · k, C]."""
    tokens, size = out.shape
    block = min(1024, triton.next_power_of_2(size))
    for at in range(0, tokens, 65_535):
        some = out[at : at + 65_535]
        sum_kernel[(triton.cdiv(size, block), some.shape[0])](
            pairs[at * top_k :],
            some,
            size,
            TOP_K=top_k,
            BLOCK=block,
            PDL=overlap,
            num_warps=max(1, block // 256),
            **launch_options(overlap),
        )


def run_experts(
    x: torch.Tensor,
    plan: ExpertPlan,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    tiles: ExpertTiles,
    gelu: bool = False,
    overlap: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Both products and the sum, for a plan made with `tiles.block_m`."""
    tokens, hidden = x.shape
    top_k = plan.weights.shape[1]
    inner = torch.empty((tokens * top_k, down.shape[2]), dtype=x.dtype, device=x.device)
    run_product(x, gate_up, plan, inner, tiles.block_m, tiles.gate_up, True, gelu, overlap)
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device) if out is None else out
    pairs = (
        out if top_k == 1 else torch.empty((tokens * top_k, hidden), dtype=x.dtype, device=x.device)
    )
    run_product(inner, down, plan, pairs, tiles.block_m, tiles.down, False, gelu, overlap)
    if top_k > 1:
        sum_pairs(pairs, out, top_k, overlap)
    return out


def _check(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> None:
    num_experts, hidden, intermediate = down.shape
    assert x.ndim == 2
    assert x.stride(1) == 1
    assert gate_up.shape == (num_experts, 2 * intermediate, hidden)
    assert gate_up.is_contiguous()
    assert down.is_contiguous()


def apply_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gelu: bool = False,
    *,
    overlap: bool = False,
    out: torch.Tensor | None = None,
    tiles: ExpertTiles | VectorTiles | None = None,
) -> torch.Tensor:
    """`reference.apply_experts`, with the inner rows and each expert's row rounded to x's dtype."""
    _check(x, gate_up, down)
    tokens, top_k = ids.shape
    overlap = overlap and tokens <= MOST_OVERLAPPED
    weights, ids = weights.contiguous(), ids.contiguous()
    tiles = tiles or tiles_for(tokens, top_k, gate_up, down)
    if isinstance(tiles, VectorTiles):
        return token_moe(x, weights, ids, gate_up, down, tiles, gelu, overlap, out)
    plan = plan_given(weights, ids, down.shape[0], tiles.block_m, overlap)
    return run_experts(x, plan, gate_up, down, tiles, gelu, overlap, out)


def fused_moe(
    x: torch.Tensor,
    logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None = None,
    gelu: bool = False,
    *,
    overlap: bool = False,
    out: torch.Tensor | None = None,
    tiles: ExpertTiles | VectorTiles | None = None,
) -> torch.Tensor:
    """`reference.fused_moe`, without any dependence on values on the host."""
    _check(x, gate_up, down)
    tokens = x.shape[0]
    overlap = overlap and tokens <= MOST_OVERLAPPED
    tiles = tiles or tiles_for(tokens, routing.top_k, gate_up, down)
    if isinstance(tiles, VectorTiles):
        weights, ids = route(logits, routing, bias, overlap=overlap and bool(tiles.overlap & 1))
        return token_moe(x, weights, ids, gate_up, down, tiles, gelu, overlap, out)
    plan = make_plan(logits, routing, bias, tiles.block_m, overlap)
    return run_experts(x, plan, gate_up, down, tiles, gelu, overlap, out)
