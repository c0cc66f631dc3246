"""Mixture of experts: Triton kernels for CUDA tensors, plain torch for all others."""

import torch

from tandem_kernels.moe import reference
from tandem_kernels.moe.routing import Routing


def route(
    logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts: weights [T, top_k] float32 and ids [T, top_k] int32, best first.

    `reference.route` describes the arguments.
    """
    if logits.is_cuda:
        from tandem_kernels.moe import route_kernel
        from tandem_kernels.overlap import is_supported

        return route_kernel.route(logits, routing, bias, overlap=is_supported())
    return reference.route(logits, routing, bias)


def apply_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gelu: bool = False,
) -> torch.Tensor:
    """The weighted sum of each token's experts [T, C], as `reference.apply_experts` defines it."""
    if x.is_cuda:
        from tandem_kernels.moe import kernel
        from tandem_kernels.overlap import is_supported

        overlap = is_supported()
        return kernel.apply_experts(x, weights, ids, gate_up, down, gelu, overlap=overlap)
    return reference.apply_experts(x, weights, ids, gate_up, down, gelu)


def fused_moe(
    x: torch.Tensor,
    logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None = None,
    gelu: bool = False,
) -> torch.Tensor:
    """Routing and experts in one call, without a host synchronisation: a CUDA graph can hold it.

    Args:
        x: [T, C].
        logits: router logits [T, E].
        gate_up: [E, 2 I, C], each expert's gate above its up.
        down: [E, C, I].
        bias: [E], for the choice of experts only.
        gelu: gelu's tanh form instead of silu.

    Returns:
        [T, C] in x's dtype.
    """
    if x.is_cuda:
        from tandem_kernels.moe import kernel
        from tandem_kernels.overlap import is_supported

        overlap = is_supported()
        return kernel.fused_moe(x, logits, gate_up, down, routing, bias, gelu, overlap=overlap)
    return reference.fused_moe(x, logits, gate_up, down, routing, bias, gelu)


__all__ = ["Routing", "apply_experts", "fused_moe", "route"]
