"""Penalties for what a sequence has already said, in one pass that also finds the new argmax."""

import torch
import triton
import triton.language as tl

from tandem_kernels.sampling.kernel import final_argmax_kernel


@triton.jit
def penalty_kernel(
    logits,
    seen,
    slots,
    repetition,
    frequency,
    presence,
    out,
    values,
    places,
    stride,
    size,
    BLOCK: tl.constexpr,
):
    """Program (part, row): the penalised logits, the highest of them, and its lowest place."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(logits + row * stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        mark = tl.load(seen + slot * size + at, mask=inside, other=0)
        factor = tl.load(repetition + row)
        repeated = tl.where(x > 0, x / factor, x * factor)
        x = tl.where(mark > 0, repeated, x)
        count = (mark >> 1).to(tl.float32)
        cost = tl.load(frequency + row) * count + tl.load(presence + row)
        x = tl.where(count > 0, x - cost, x)
    tl.store(out + row * size + at, x, mask=inside)
    value, place = tl.max(x, axis=0, return_indices=True)
    part = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(values + part, value)
    tl.store(places + part, tl.program_id(0) * BLOCK + place)


def penalize(
    logits: torch.Tensor,
    seen: torch.Tensor,
    slots: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
    *,
    block: int = 4096,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `reference.penalize` computes. V must be contiguous in `logits`, `seen` altogether."""
    rows, size = logits.shape
    block = min(block, max(64, triton.next_power_of_2(size)))
    parts = triton.cdiv(size, block)
    out = torch.empty((rows, size), dtype=torch.float32, device=logits.device)
    values = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    places = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    best = torch.empty(rows, dtype=torch.int64, device=logits.device)
    penalty_kernel[(parts, rows)](
        logits, seen, slots, repetition, frequency, presence, out, values, places,
        logits.stride(0), size, BLOCK=block, num_warps=8,
    )  # fmt: skip
    final_argmax_kernel[(rows,)](
        values, places, best, parts, BLOCK=max(16, triton.next_power_of_2(parts))
    )
    return out, best
