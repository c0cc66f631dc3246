"""The most likely token of each row in two short passes."""

import torch
import triton
import triton.language as tl


@triton.jit
def part_argmax_kernel(logits, values, places, stride, size, BLOCK: tl.constexpr):
    """Program (row, part): the highest logit of a part, and the lowest place that holds it."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(logits + row * stride + at, mask=at < size, other=float("-inf"))
    value, place = tl.max(found.to(tl.float32), axis=0, return_indices=True)
    out = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(values + out, value)
    tl.store(places + out, tl.program_id(1) * BLOCK + place)


@triton.jit
def final_argmax_kernel(values, places, out, count, BLOCK: tl.constexpr):
    """Program (row): over the parts; the first of equal ones."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    found = tl.load(values + row * count + at, mask=at < count, other=float("-inf"))
    _, part = tl.max(found, axis=0, return_indices=True)
    tl.store(out + row, tl.load(places + row * count + part).to(tl.int64))


def greedy(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """argmax of each row [B] int64; the lowest id among equals. logits: [B, V], V contiguous."""
    rows, size = logits.shape
    block = 4096
    parts = triton.cdiv(size, block)
    values = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    places = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out
    grid = (rows, parts)
    part_argmax_kernel[grid](logits, values, places, logits.stride(0), size, BLOCK=block)
    final_argmax_kernel[(rows,)](
        values, places, out, parts, BLOCK=max(16, triton.next_power_of_2(parts))
    )
    return out
