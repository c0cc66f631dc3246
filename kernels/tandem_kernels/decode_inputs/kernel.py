"""A decode step's inputs in one launch."""

import torch
import triton
import triton.language as tl

from tandem_kernels.decode_inputs.reference import DecodeInputs


@triton.jit(do_not_specialize=["batch"])
def decode_inputs_kernel(
    staged,
    sampled,
    tables,
    token_ids,
    positions,
    slot_blocks,
    slot_offsets,
    lengths,
    batch,
    stride_staged,
    stride_tables,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program: BLOCK sequences."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < batch
    source = tl.load(staged + row, mask=inside, other=0)
    position = tl.load(staged + stride_staged + row, mask=inside, other=-1)
    real = position >= 0
    before = tl.load(sampled + (-1 - source), mask=real & (source < 0), other=0)
    token = tl.where(source >= 0, source.to(tl.int64), before)
    at = tl.maximum(position, 0)
    table = tables + row.to(tl.int64) * stride_tables
    block = tl.load(table + at // PAGE, mask=real, other=-1)
    tl.store(token_ids + row, tl.where(real, token, 0), mask=inside)
    tl.store(positions + row, at.to(tl.int64), mask=inside)
    tl.store(slot_blocks + row, block.to(tl.int64), mask=inside)
    tl.store(slot_offsets + row, (at % PAGE).to(tl.int64), mask=inside)
    tl.store(lengths + row, position + 1, mask=inside)


def fill_inputs(
    staged: torch.Tensor, sampled: torch.Tensor, tables: torch.Tensor, page: int, out: DecodeInputs
) -> None:
    """The reference's `fill_inputs`; `staged` and `tables` with contiguous rows."""
    batch = staged.shape[1]
    block = min(128, triton.next_power_of_2(batch))
    decode_inputs_kernel[(triton.cdiv(batch, block),)](
        staged,
        sampled,
        tables,
        out.token_ids,
        out.positions,
        out.slot_blocks,
        out.slot_offsets,
        out.lengths,
        batch,
        staged.stride(0),
        tables.stride(0),
        PAGE=page,
        BLOCK=block,
        num_warps=max(1, block // 32),
    )
