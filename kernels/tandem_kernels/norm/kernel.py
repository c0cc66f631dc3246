"""RMS norm in one pass: a program holds its whole row in registers."""

import torch
import triton
import triton.language as tl

from tandem_kernels.overlap import (
    launch_options,
    let_next_start,
    starts_next_early,
    wait_for_inputs,
)


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    stride_x,
    stride_residual,
    stride_out,
    size,
    epsilon,
    ADD: tl.constexpr,
    WEIGHT_IN_FLOAT32: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Row by row: with ADD, residual += x first, and the sum is what is normed."""
    let_next_start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < size
    weights = tl.load(weight + places, mask=inside, other=0.0)
    wait_for_inputs(PDL)
    wide = tl.load(x + row * stride_x + places, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        at = residual + row * stride_residual + places
        wide += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(residual.dtype.element_ty)
        tl.store(at, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / size + epsilon)
    if WEIGHT_IN_FLOAT32:
        found = (normed * weights.to(tl.float32)).to(out.dtype.element_ty)
    else:
        found = normed.to(out.dtype.element_ty) * weights
    tl.store(out + row * stride_out + places, found, mask=inside)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    epsilon: float,
    weight_in_float32: bool,
    overlap: bool,
) -> torch.Tensor:
    size = x.shape[-1]
    rows, outs = x.reshape(-1, size), out.view(-1, size)
    added = rows if residual is None else residual.view(-1, size)
    block = triton.next_power_of_2(size)
    rms_norm_kernel[(rows.shape[0],)](
        rows,
        added,
        weight,
        outs,
        rows.stride(0),
        added.stride(0),
        outs.stride(0),
        size,
        epsilon,
        ADD=residual is not None,
        WEIGHT_IN_FLOAT32=weight_in_float32,
        BLOCK=block,
        # 8 elements of 2 bytes per thread are one 16-byte access.
        num_warps=min(max(block // 512, 1), 16),
        PDL=overlap,
        EARLY=overlap and starts_next_early(rows.shape[0]),
        **launch_options(overlap),
    )
    return out


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    weight_in_float32: bool = False,
    out: torch.Tensor | None = None,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The reference's `rms_norm`; x is [..., D] with contiguous D, the result contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    return _launch(x, None, weight, out, epsilon, weight_in_float32, overlap)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    weight_in_float32: bool = False,
    out: torch.Tensor | None = None,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """residual += x in place; returns the norm of the sum. All [..., D], residual contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    return _launch(x, residual, weight, out, epsilon, weight_in_float32, overlap)
