"""One-shot all-reduce through peer memory: each rank writes its rows to all, then adds what came.

Every rank has a mailbox that the others can write to: flags, then slots. A program moves one row:
it writes the row to its slot in each peer's mailbox, raises a flag there, waits for its own flags,
and adds. Slots alternate between two halves. A rank that has seen a peer's flag knows that the
peer's previous kernel is over, so no one is still reading what was written two turns ago: one wait
is enough.
"""

import torch
import triton
import triton.language as tl

from tandem_kernels.overlap import launch_options, wait_for_inputs
from tandem_kernels.peer_sum.layout import AddNorm, Layout


@triton.jit
def sum_ranks_kernel(
    x,
    out,
    residual,
    weight,
    mailboxes,
    turns,
    size,
    most_rows,
    epsilon,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT_IN_FLOAT32: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = Σ over ranks of x, row by row; with NORM, residual += that, and out is its norm."""
    row = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    inside = places < size
    dtype = x.dtype.element_ty
    at = row.to(tl.int64) * size + places
    if NORM:
        weights = tl.load(weight + places, mask=inside, other=0.0)
    wait_for_inputs(PDL)
    turn = tl.load(turns + row) + 1
    own = tl.load(x + at, mask=inside, other=0.0)
    half = (turn & 1) * RANKS
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            slot = ((half + RANK) * most_rows + row) * BLOCK
            slots = (tl.load(mailboxes + peer) + SLOTS).to(tl.pointer_type(dtype)) + slot
            tl.store(tl.multiple_of(slots + places, 16), own, inside)
    tl.debug_barrier()  # the row is written by all threads, the flags by one
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            flags = tl.load(mailboxes + peer).to(tl.pointer_type(tl.int64))
            tl.atomic_xchg(flags + row * RANKS + RANK, turn, sem="release", scope="sys")
    mailbox = tl.load(mailboxes + RANK)
    flags = mailbox.to(tl.pointer_type(tl.int64)) + row * RANKS
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            seen = tl.atomic_add(flags + peer, 0, sem="acquire", scope="sys")
            while seen < turn:
                seen = tl.atomic_add(flags + peer, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    slots = (mailbox + SLOTS).to(tl.pointer_type(dtype))
    wide = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(RANKS):
        if peer == RANK:
            wide += own.to(tl.float32)
        else:
            slot = slots + ((half + peer) * most_rows + row) * BLOCK
            part = tl.load(tl.multiple_of(slot + places, 16), inside, other=0.0, volatile=True)
            wide += part.to(tl.float32)
    found = wide.to(dtype)
    if NORM:
        wide = found.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(residual.dtype.element_ty)
        tl.store(residual + at, rounded, mask=inside)
        wide = rounded.to(tl.float32)
        normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / size + epsilon)
        if WEIGHT_IN_FLOAT32:
            found = (normed * weights.to(tl.float32)).to(dtype)
        else:
            found = normed.to(dtype) * weights
    tl.store(out + at, found, mask=inside)
    tl.store(turns + row, turn)


def sum_ranks(
    x: torch.Tensor,
    mailboxes: torch.Tensor,
    turns: torch.Tensor,
    rank: int,
    layout: Layout,
    norm: AddNorm | None = None,
    *,
    overlap: bool = False,
) -> torch.Tensor:
    """The sum of x [R, C] over all ranks, as `peer_sum.sum_ranks` describes it."""
    rows = x.shape[0]
    assert x.is_contiguous()
    assert x.dtype == layout.dtype
    assert x.shape == (rows, layout.size)
    assert rows <= layout.most_rows
    out = x if norm is None else torch.empty_like(x)
    residual = x if norm is None else norm.residual
    assert residual.is_contiguous()
    sum_ranks_kernel[(rows,)](
        x,
        out,
        residual,
        x if norm is None else norm.weight,
        mailboxes,
        turns,
        layout.size,
        layout.most_rows,
        0.0 if norm is None else norm.epsilon,
        SLOTS=layout.slots,
        RANK=rank,
        RANKS=layout.ranks,
        NORM=norm is not None,
        WEIGHT_IN_FLOAT32=norm is not None and norm.weight_in_float32,
        BLOCK=layout.block,
        PDL=overlap,
        num_warps=min(max(layout.block // 512, 1), 16),
        **launch_options(overlap),
    )
    return out
