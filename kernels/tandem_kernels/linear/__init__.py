"""Linear layers. With few rows the time is that of reading the weights, and Triton reads them
faster than cuBLAS; on Hopper, where it was measured to be faster still, that is a kernel in Gluon.
With many, cuBLAS is at the matmul rate.
"""

from typing import TYPE_CHECKING

import torch

from tandem_kernels.linear import reference
from tandem_kernels.tuning import tuned_hopper_gemm

if TYPE_CHECKING:
    from tandem_kernels.linear.hopper_linear import HopperTiles
    from tandem_kernels.linear.kernel import GemmTiles

MOST_ROWS = 128
"""The kernels' limit; from 65 on they are used where they were measured to be faster."""


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x Wᵀ + b for x [T, K] and weight [N, K]; `out` [T, N] is written where it is given."""
    if not x.is_cuda:
        found = reference.linear(x, weight, bias)
        return found if out is None else out.copy_(found)
    on_hopper = hopper_tiles(x, weight)
    if on_hopper is not None:
        from tandem_kernels.linear.hopper_linear import hopper_linear

        return hopper_linear(x, weight, bias, out=out, tiles=on_hopper, overlap=True)
    tiles = _tiles(x, weight, gate=False)
    if tiles is not None:
        from tandem_kernels.linear.kernel import small_linear
        from tandem_kernels.overlap import is_supported

        return small_linear(x, weight, bias, out=out, tiles=tiles, overlap=is_supported())
    if out is None:
        return torch.nn.functional.linear(x, weight, bias)
    return (
        torch.mm(x, weight.t(), out=out)
        if bias is None
        else torch.addmm(bias, x, weight.t(), out=out)
    )


def wide_linear(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x Wᵀ in float32 [T, N] for x [T, K] and weight [N, K], into `out` where it is given.

    For logits: with 16 bits those of the likeliest tokens often round to the same number. On a CPU
    the product is rounded to x's dtype nonetheless, as torch has no other that is as fast there.
    """
    if not x.is_cuda:
        found = reference.linear(x, weight).float()
        return found if out is None else out.copy_(found)
    if out is None:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    tiles = _tiles(x, weight, gate=False)
    if tiles is not None:
        from tandem_kernels.linear.kernel import small_linear
        from tandem_kernels.overlap import is_supported

        return small_linear(x, weight, out=out, tiles=tiles, overlap=is_supported())
    if x.dtype == torch.float32:
        return torch.mm(x, weight.t(), out=out)
    return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)


def gated_linear(
    x: torch.Tensor, weight: torch.Tensor, gelu: bool = False, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """act(x Gᵀ) · (x Uᵀ) for weight [2 N, K] = G above U; act is silu, or gelu's tanh form."""
    if not x.is_cuda:
        return reference.gated_linear(x, weight, gelu, bias)
    tiles = None if bias is not None else _tiles(x, weight, gate=True)
    if tiles is not None:
        from tandem_kernels.linear.kernel import small_linear
        from tandem_kernels.overlap import is_supported

        return small_linear(x, weight, gate=True, gelu=gelu, tiles=tiles, overlap=is_supported())
    from tandem_kernels.activation import gelu_tanh_and_multiply, silu_and_multiply

    activate = gelu_tanh_and_multiply if gelu else silu_and_multiply
    return activate(torch.nn.functional.linear(x, weight, bias))


def hopper_tiles(x: torch.Tensor, weight: torch.Tensor) -> "HopperTiles | None":
    """The Gluon kernel's configuration where it was measured to be the fastest, or None."""
    rows, size = x.shape
    if not 1 < rows <= MOST_ROWS:
        return None
    tuned = tuned_hopper_gemm(rows, weight.shape[0], size)
    if tuned is None:
        return None
    from tandem_kernels.linear.hopper_linear import HopperTiles, suits

    return HopperTiles(*tuned) if suits(x, weight) else None


def _tiles(x: torch.Tensor, weight: torch.Tensor, gate: bool) -> "GemmTiles | None":
    """The Triton kernel's configuration for these shapes, or None where cuBLAS is to be used."""
    rows, size = x.shape
    if rows > MOST_ROWS or x.dtype not in (torch.bfloat16, torch.float16):
        return None
    from tandem_kernels.linear.kernel import choose_tiles

    return choose_tiles(rows, weight.shape[0] // (2 if gate else 1), size, gate)


__all__ = ["gated_linear", "hopper_tiles", "linear", "wide_linear"]
