"""Sorting a step's tokens by expert, on the device and in launches of fixed size.

The plan of a step is `order` [T · k], the (token, choice) pairs sorted by expert, and `blocks`
[3, most]: the expert, the first sorted pair and the number of pairs of each block of at most
BLOCK_M rows. Blocks that no expert needs hold 0 pairs, so a grid over the most blocks that any
routing can need serves every step, and a CUDA graph can hold it.

Few tokens: one program routes and sorts all of them, in registers. Many: programs route in
parallel, then one program per expert counts its pairs, and one per expert places them, in order of
tokens. Nothing depends on which program is first.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tandem_kernels.moe.route_kernel import choose_experts, route, routing_options
from tandem_kernels.moe.routing import Routing
from tandem_kernels.overlap import launch_options, wait_for_inputs

SMALL_TILE = 2_048
"""The most tokens times experts, each rounded up to a power of 2, that one program sorts."""


@triton.jit
def write_blocks(
    blocks, most, experts, first, offsets, counts, BLOCK_M: tl.constexpr, MOST_EACH: tl.constexpr
):
    """Blocks of each of `experts`, from number `first` on, for its pairs from `offsets` on."""
    for number in range(0, MOST_EACH):
        done = number * BLOCK_M
        real = done < counts
        at = blocks + first + number
        tl.store(at, experts, mask=real)
        tl.store(at + most, offsets + done, mask=real)
        tl.store(at + 2 * most, tl.minimum(counts - done, BLOCK_M), mask=real)


@triton.jit(do_not_specialize=["T", "most"])
def small_plan_kernel(
    logits,
    bias,
    weights,
    ids,
    order,
    blocks,
    T,
    E,
    stride,
    most,
    GIVEN: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MOST_POW2: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: routes (unless the ids are GIVEN) and sorts all tokens."""
    wait_for_inputs(PDL)
    rows = tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    if GIVEN:
        place = tl.full([BLOCK_T, BLOCK_E], -1, tl.int32)
        for turn in tl.static_range(TOP_K):
            chosen = tl.load(ids + rows * TOP_K + turn, mask=rows < T, other=-1)
            place = tl.where(experts[None, :] == chosen[:, None], turn, place)
    else:
        place, found = choose_experts(
            logits, bias, rows, T, E, stride, TOP_K, SIGMOID, RENORMALISE, BIAS, GROUPS,
            TOP_GROUPS, TOP2, SCALE, BLOCK_E,
        )  # fmt: skip
        tl.store(weights + rows[:, None] * TOP_K + place, found, mask=place >= 0)
    chosen = (place >= 0).to(tl.int32)
    rank = tl.cumsum(chosen, axis=0) - chosen
    counts = tl.sum(chosen, axis=0)
    offsets = tl.cumsum(counts, axis=0) - counts
    tl.store(order + offsets[None, :] + rank, rows[:, None] * TOP_K + place, mask=place >= 0)
    needed = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.cumsum(needed, axis=0) - needed
    most_each: tl.constexpr = (BLOCK_T + BLOCK_M - 1) // BLOCK_M
    write_blocks(blocks, most, experts, first, offsets, counts, BLOCK_M, most_each)
    numbers = tl.arange(0, MOST_POW2)
    unused = (numbers >= tl.sum(needed, axis=0)) & (numbers < most)
    tl.store(blocks + 2 * most + numbers, tl.zeros([MOST_POW2], tl.int32), mask=unused)


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(ids, counts, num_pairs, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """Program: one expert; how many pairs chose it."""
    wait_for_inputs(PDL)
    expert = tl.program_id(0)
    found = tl.zeros([CHUNK], tl.int32)
    for start in range(0, num_pairs, CHUNK):
        pairs = start + tl.arange(0, CHUNK)
        chosen = tl.load(ids + pairs, mask=pairs < num_pairs, other=-1)
        found += (chosen == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, axis=0))


@triton.jit(do_not_specialize=["num_pairs", "most"])
def place_kernel(
    ids,
    counts,
    order,
    blocks,
    num_pairs,
    E,
    most,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MOST_EACH: tl.constexpr,
    MOST_POW2: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: one expert; its pairs in order of tokens, and its blocks."""
    wait_for_inputs(PDL)
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    every = tl.load(counts + experts, mask=experts < E, other=0)
    needed = (every + BLOCK_M - 1) // BLOCK_M
    before = experts < expert
    offset = tl.sum(tl.where(before, every, 0), axis=0)
    first = tl.sum(tl.where(before, needed, 0), axis=0)
    count = tl.sum(tl.where(experts == expert, every, 0), axis=0)
    numbers = tl.arange(0, MOST_EACH)
    real = numbers * BLOCK_M < count
    at = blocks + first + numbers
    tl.store(at, tl.zeros([MOST_EACH], tl.int32) + expert, mask=real)
    tl.store(at + most, offset + numbers * BLOCK_M, mask=real)
    tl.store(at + 2 * most, tl.minimum(count - numbers * BLOCK_M, BLOCK_M), mask=real)
    numbers = tl.arange(0, MOST_POW2)
    unused = (numbers >= tl.sum(needed, axis=0)) & (numbers < most) & (numbers % E == expert)
    tl.store(blocks + 2 * most + numbers, tl.zeros([MOST_POW2], tl.int32), mask=unused)
    for start in range(0, num_pairs, CHUNK):
        pairs = start + tl.arange(0, CHUNK)
        mine = tl.load(ids + pairs, mask=pairs < num_pairs, other=-1) == expert
        rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(order + offset + rank, pairs, mask=mine)
        offset += tl.sum(mine.to(tl.int32), axis=0)


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """A step's (token, choice) pairs sorted by expert, and blocks of them of one expert each."""

    weights: torch.Tensor
    """[T, k] float32."""
    order: torch.Tensor
    """[T · k] int32."""
    blocks: torch.Tensor
    """[3, most] int32."""


def most_blocks(tokens: int, top_k: int, num_experts: int, block_m: int) -> int:
    """The number of blocks that the least favourable routing needs."""
    pairs = tokens * top_k
    hit = min(num_experts, pairs)
    return hit + (pairs - hit) // block_m


def _launch_small(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor,
    ids: torch.Tensor | None,
    num_experts: int,
    block_m: int,
    options: dict[str, object],
    overlap: bool,
) -> ExpertPlan:
    tokens, top_k = weights.shape
    most = most_blocks(tokens, top_k, num_experts, block_m)
    order = torch.empty(tokens * top_k, dtype=torch.int32, device=weights.device)
    blocks = torch.empty((3, most), dtype=torch.int32, device=weights.device)
    block_t = max(2, triton.next_power_of_2(tokens))
    size = block_t * triton.next_power_of_2(num_experts)
    small_plan_kernel[(1,)](
        logits,
        logits if bias is None else bias,
        weights,
        order if ids is None else ids,
        order,
        blocks,
        tokens,
        num_experts,
        logits.stride(0),
        most,
        GIVEN=ids is not None,
        BLOCK_T=block_t,
        BLOCK_M=block_m,
        MOST_POW2=triton.next_power_of_2(most),
        PDL=overlap,
        num_warps=min(max(size // 512, 4), 16),
        **options,
        **launch_options(overlap),
    )
    return ExpertPlan(weights, order, blocks)


def plan_small(
    logits: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None,
    block_m: int,
    overlap: bool = False,
) -> ExpertPlan:
    """Route and sort few tokens in one launch. logits: [T, E]."""
    tokens, num_experts = logits.shape
    weights = torch.empty((tokens, routing.top_k), dtype=torch.float32, device=logits.device)
    options = routing_options(routing, bias, num_experts)
    return _launch_small(logits, bias, weights, None, num_experts, block_m, options, overlap)


def plan_given(
    weights: torch.Tensor,
    ids: torch.Tensor,
    num_experts: int,
    block_m: int,
    overlap: bool = False,
) -> ExpertPlan:
    """Sort pairs by expert. weights, ids: [T, k] contiguous, ids distinct in a row."""
    tokens, top_k = ids.shape
    if not fits_one_program(tokens, num_experts):
        return plan_large(weights, ids, num_experts, block_m, overlap)
    options = routing_options(Routing(top_k), None, num_experts)
    return _launch_small(weights, None, weights, ids, num_experts, block_m, options, overlap)


def plan_large(
    weights: torch.Tensor,
    ids: torch.Tensor,
    num_experts: int,
    block_m: int,
    overlap: bool = False,
    chunk: int = 16_384,
) -> ExpertPlan:
    """Sort pairs by expert with one program per expert. ids: [T, k], distinct in a row."""
    tokens, top_k = ids.shape
    most = most_blocks(tokens, top_k, num_experts, block_m)
    pairs = tokens * top_k
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    blocks = torch.empty((3, most), dtype=torch.int32, device=ids.device)
    counts = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    chunk = min(chunk, triton.next_power_of_2(pairs))
    options = {
        "CHUNK": chunk,
        "PDL": overlap,
        "num_warps": min(max(chunk // 1024, 1), 16),
        **launch_options(overlap),
    }
    count_kernel[(num_experts,)](ids, counts, pairs, **options)
    place_kernel[(num_experts,)](
        ids,
        counts,
        order,
        blocks,
        pairs,
        num_experts,
        most,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_M=block_m,
        MOST_EACH=triton.next_power_of_2(triton.cdiv(tokens, block_m)),
        MOST_POW2=triton.next_power_of_2(most),
        **options,
    )
    return ExpertPlan(weights, order, blocks)


def fits_one_program(tokens: int, num_experts: int) -> bool:
    """Whether `plan_small` takes this many tokens."""
    rows = max(2, triton.next_power_of_2(tokens))
    return bool(rows * triton.next_power_of_2(num_experts) <= SMALL_TILE)


def make_plan(
    logits: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None,
    block_m: int,
    overlap: bool = False,
) -> ExpertPlan:
    """Route tokens [T, E] and sort them by expert, into blocks of at most `block_m`."""
    tokens, num_experts = logits.shape
    if fits_one_program(tokens, num_experts):
        return plan_small(logits, routing, bias, block_m, overlap)
    weights, ids = route(logits, routing, bias, overlap=overlap)
    return plan_large(weights, ids, num_experts, block_m, overlap)
