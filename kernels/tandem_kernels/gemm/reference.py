"""Linear layers in plain torch."""

import torch
from torch.nn import functional


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x Wᵀ + b.

    Args:
        x: [..., K].
        weight: [N, K], in x's dtype; or int8 or float8_e4m3fn, to be multiplied by `scale`.
        bias: [N].
        scale: [N] float32, one per output channel.

    Returns:
        [..., N] in x's dtype.
    """
    if scale is not None:
        weight = (weight.float() * scale[:, None]).to(x.dtype)
    return functional.linear(x, weight, bias)


def quantize_rows(
    weight: torch.Tensor, dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric weights of 8 bits: ([N, K] in `dtype`, [N] float32), for int8 or float8_e4m3fn."""
    most = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / most
    scaled = weight.float() / scale[:, None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def gated_linear(
    x: torch.Tensor, weight: torch.Tensor, gelu: bool = False, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """act(x Gᵀ) · (x Uᵀ) for weight [2 N, K] = G above U; act is silu, or gelu's tanh form."""
    gate, up = linear(x, weight, scale=scale).chunk(2, dim=-1)
    active = functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)
    return active * up
