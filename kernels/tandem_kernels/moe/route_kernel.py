"""Routing on the device: scores, groups and the best experts of each token, in registers."""

import torch
import triton
import triton.language as tl

from tandem_kernels.moe.routing import Routing
from tandem_kernels.overlap import launch_options, wait_for_inputs


@triton.jit
def choose_experts(
    logits,
    bias,
    rows,
    T,
    E,
    stride,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """For tokens `rows`: each expert's place among the chosen (-1: not chosen) and its weight."""
    experts = tl.arange(0, BLOCK_E)
    inside = (rows < T)[:, None] & (experts < E)[None, :]
    at = logits + rows.to(tl.int64)[:, None] * stride + experts[None, :]
    found = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    # Whatever the logits are, a token gets TOP_K different experts: ids say where to read.
    found = tl.where(found == found, tl.minimum(tl.maximum(found, -1e30), 1e30), -1e30)
    found = tl.where(inside, found, float("-inf"))
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(tl.minimum(-found, 80.0)))
    else:
        # Rows past the end hold no finite logit.
        most = tl.where(rows < T, tl.max(found, axis=1), 0.0)
        scores = tl.exp(found - most[:, None])
        scores = scores / tl.maximum(tl.sum(scores, axis=1), 1e-30)[:, None]
    choice = scores
    if BIAS:
        choice += tl.load(bias + experts, mask=experts < E, other=0.0).to(tl.float32)[None, :]
    left = tl.where(inside, choice, float("-inf"))
    if GROUPS > 1:
        group_of = experts // (E // GROUPS)
        judged = tl.full(left.shape, float("-inf"), tl.float32)
        for group in tl.static_range(GROUPS):
            mine = tl.where((group_of == group)[None, :], left, float("-inf"))
            score = tl.max(mine, axis=1)
            if TOP2:
                best = tl.argmax(mine, axis=1)
                rest = tl.where(experts[None, :] == best[:, None], float("-inf"), mine)
                score += tl.max(rest, axis=1)
            judged = tl.where((group_of == group)[None, :] & inside, score[:, None], judged)
        kept = experts[None, :] < tl.zeros(left.shape, tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            best = tl.argmax(judged, axis=1) // (E // GROUPS)
            hit = group_of[None, :] == best[:, None]
            kept = kept | hit
            judged = tl.where(hit, float("-inf"), judged)
        left = tl.where(kept, left, float("-inf"))
    place = tl.full(left.shape, -1, tl.int32)
    if left.shape[0] == 1 and BLOCK_E <= 256:
        # One token waits for its experts: all comparisons at once are sooner done than in turns.
        mine = tl.sum(left, axis=0)
        better = mine[None, :] > mine[:, None]
        first = (mine[None, :] == mine[:, None]) & (experts[None, :] < experts[:, None])
        rank = tl.sum((better | first).to(tl.int32), axis=1)[None, :]
        place = tl.where(inside & (rank < TOP_K), rank, place)
    else:
        for turn in tl.static_range(TOP_K):
            hit = experts[None, :] == tl.argmax(left, axis=1)[:, None]
            place = tl.where(hit & inside, turn, place)
            left = tl.where(hit, float("-inf"), left)
    weights = tl.where(place >= 0, scores, 0.0)
    if RENORMALISE:
        weights = weights / tl.maximum(tl.sum(weights, axis=1), 1e-20)[:, None]
    return place, weights * SCALE


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    logits,
    bias,
    weights,
    ids,
    T,
    E,
    stride,
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
    PDL: tl.constexpr,
):
    """Program: BLOCK_T tokens."""
    wait_for_inputs(PDL)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    place, found = choose_experts(
        logits, bias, rows, T, E, stride, TOP_K, SIGMOID, RENORMALISE, BIAS, GROUPS, TOP_GROUPS,
        TOP2, SCALE, BLOCK_E,
    )  # fmt: skip
    at = rows[:, None] * TOP_K + place
    tl.store(weights + at, found, mask=place >= 0)
    experts = tl.arange(0, BLOCK_E)[None, :] + tl.zeros(place.shape, tl.int32)
    tl.store(ids + at, experts, mask=place >= 0)


def routing_options(
    routing: Routing, bias: torch.Tensor | None, num_experts: int
) -> dict[str, object]:
    """The rule's constants, with which the kernels are compiled."""
    assert num_experts % routing.num_groups == 0
    assert routing.top_k <= num_experts // routing.num_groups * routing.top_groups
    return {
        "TOP_K": routing.top_k,
        "SIGMOID": routing.scoring == "sigmoid",
        "RENORMALISE": routing.renormalise,
        "BIAS": bias is not None,
        "GROUPS": routing.num_groups,
        "TOP_GROUPS": routing.top_groups,
        "TOP2": routing.group_score == "top2",
        "SCALE": routing.scale,
        "BLOCK_E": triton.next_power_of_2(num_experts),
    }


def route(
    logits: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None = None,
    *,
    overlap: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.route`; among equal scores the first expert wins."""
    tokens, num_experts = logits.shape
    assert logits.stride(1) == 1
    weights = torch.empty((tokens, routing.top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((tokens, routing.top_k), dtype=torch.int32, device=logits.device)
    options = routing_options(routing, bias, num_experts)
    width = triton.next_power_of_2(num_experts)
    block_t = max(1, min(triton.next_power_of_2(tokens), 1024 // width))
    route_kernel[(triton.cdiv(tokens, block_t),)](
        logits,
        logits if bias is None else bias,
        weights,
        ids,
        tokens,
        num_experts,
        logits.stride(0),
        BLOCK_T=block_t,
        PDL=overlap,
        num_warps=min(max(4, width // 8), 16) if block_t == 1 else min(block_t, 4),
        **options,
        **launch_options(overlap),
    )
    return weights, ids
