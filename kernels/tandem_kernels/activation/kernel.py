"""Gated activations: one read of both halves, one write."""

import torch
import triton
import triton.language as tl


@triton.jit
def activate(gate, GELU: tl.constexpr):
    """silu, or gelu in its tanh form, of float32 values."""
    inner = gate
    if GELU:
        # gelu = gate · sigmoid(2 · 0.79788 · (gate + 0.044715 gate³)), the same function.
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp2(tl.minimum(-1.4426950408889634 * inner, 126.0)))


@triton.jit
def gate_kernel(x, out, stride_x, stride_out, size, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, block of columns)."""
    row = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    at = x + row * stride_x + places
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=inside, other=0.0).to(tl.float32)
    found = activate(gate, GELU) * up
    tl.store(out + row * stride_out + places, found.to(out.dtype.element_ty), mask=inside)


def _launch(x: torch.Tensor, gelu: bool, out: torch.Tensor | None, block: int) -> torch.Tensor:
    size = x.shape[-1] // 2
    if out is None:
        out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    rows, outs = x.reshape(-1, 2 * size), out.view(-1, size)
    block = min(block, triton.next_power_of_2(size))
    # The grid's second axis ends at 65,535 rows.
    for at in range(0, rows.shape[0], 65_535):
        some, into = rows[at : at + 65_535], outs[at : at + 65_535]
        gate_kernel[(triton.cdiv(size, block), some.shape[0])](
            some,
            into,
            some.stride(0),
            into.stride(0),
            size,
            GELU=gelu,
            BLOCK=block,
            num_warps=min(max(block // 256, 1), 8),
        )
    return out


def silu_and_multiply(
    x: torch.Tensor, out: torch.Tensor | None = None, block: int = 2048
) -> torch.Tensor:
    """The reference's `silu_and_multiply`, computed in float32. x: [..., 2 I], contiguous."""
    return _launch(x, False, out, block)


def gelu_tanh_and_multiply(
    x: torch.Tensor, out: torch.Tensor | None = None, block: int = 2048
) -> torch.Tensor:
    """The reference's `gelu_tanh_and_multiply`, computed in float32. x: [..., 2 I], contiguous."""
    return _launch(x, True, out, block)
