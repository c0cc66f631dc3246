"""Linear layers in plain torch, with the faster of two orders of the product on a CPU."""

from typing import Final

import torch
from torch.nn import functional

from tandem_kernels.activation import reference as activation

_FEW_ROWS: Final = range(2, 17)


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
        [..., N] in x's dtype, contiguous.
    """
    if scale is not None:
        weight = (weight.float() * scale[:, None]).to(x.dtype)
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[0] in _FEW_ROWS:
        # A decode step's few rows: with MKL, W xᵀ is 1.5 to 8 times as fast as x Wᵀ, both for
        # 65,536 x 640 and for 4,096 x 640 (2 to 16 rows, AVX-512, one and two threads).
        product = (weight @ x.t()).t()
        found = product.contiguous()
        return found if bias is None else found.add_(bias)
    return functional.linear(x, weight, bias)


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    gelu: bool = False,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(x Gᵀ) · (x Uᵀ) for weight [2 N, K] = G above U; act is silu, or gelu's tanh form."""
    activate = activation.gelu_tanh_and_multiply if gelu else activation.silu_and_multiply
    return activate(linear(x, weight, bias, scale))


def quantize_rows(
    weight: torch.Tensor, dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric weights of 8 bits: ([N, K] in `dtype`, [N] float32), for int8 or float8_e4m3fn."""
    most = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / most
    scaled = weight.float() / scale[:, None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale
