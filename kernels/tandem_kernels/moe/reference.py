"""Mixture of experts in plain torch (Shazeer et al., arXiv 1701.06538)."""

import torch
from torch.nn import functional

from tandem_kernels.moe.routing import Routing


def route(
    logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token and their weights.

    Args:
        logits: [T, E].
        bias: [E], added to the scores for the choice, not for the weights.

    Returns:
        Weights [T, top_k] float32 and expert ids [T, top_k] int32, best first.
    """
    wide = logits.float()
    scores = wide.softmax(-1) if routing.scoring == "softmax" else wide.sigmoid()
    choice = scores if bias is None else scores + bias.float()
    if routing.num_groups > 1:
        grouped = choice.unflatten(-1, (routing.num_groups, -1))  # [T, groups, E / groups]
        best = grouped.topk(2 if routing.group_score == "top2" else 1, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept.scatter_(-1, best.topk(routing.top_groups, dim=-1).indices, True)
        choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    ids = choice.topk(routing.top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if routing.renormalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
    return weights * routing.scale, ids.int()


def apply_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gelu: bool = False,
) -> torch.Tensor:
    """Σ over a token's experts e of weight · (act(x Gₑᵀ) · (x Uₑᵀ)) Dₑᵀ, summed in float32.

    Args:
        x: [T, C].
        weights: [T, k].
        ids: [T, k], distinct in a row.
        gate_up: [E, 2 I, C], each G above U.
        down: [E, C, I].
        gelu: act is gelu's tanh form, else silu.

    Returns:
        [T, C] in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for expert in ids.unique().tolist():
        token, place = torch.where(ids == expert)
        gate, up = functional.linear(x[token], gate_up[expert].to(x.dtype)).chunk(2, dim=-1)
        active = functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)
        found = functional.linear(active * up, down[expert].to(x.dtype))
        out.index_add_(0, token, found.to(wide) * weights[token, place, None].to(wide))
    return out.to(x.dtype)


def fused_moe(
    x: torch.Tensor,
    logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None = None,
    gelu: bool = False,
) -> torch.Tensor:
    """`route` and `apply_experts`: x [T, C] and router logits [T, E] → [T, C]."""
    weights, ids = route(logits, routing, bias)
    return apply_experts(x, weights, ids, gate_up, down, gelu)
