"""Decode attention over paged KV: one query token per sequence, split over the keys.

Flash-Decoding (Dao et al., 2023) with the query heads of a KV head packed into the rows of one
matrix product, and units from `split_plan`. Scores live in base 2: exp2 is one instruction.
"""

import torch
import triton
import triton.language as tl

from tandem_kernels.attention.float8_kernel import halve_pairs, scale_rows
from tandem_kernels.attention.split_plan import DecodePlan
from tandem_kernels.launch import Launcher
from tandem_kernels.overlap import (
    launch_options,
    let_next_start,
    starts_next_early,
    wait_for_inputs,
)

_LOG2E = 1.4426950408889634

FUSE_FROM = 128
"""From this many sequences times KV heads on, the attention kernel merges splits (H100)."""


@triton.jit
def cap_scores(scores, SOFTCAP: tl.constexpr):
    """softcap · tanh(score / softcap), from exp2; scores and result in base 2 (times log2 e)."""
    inner = 2.0 * scores / SOFTCAP  # still times log2 e, which turns exp into exp2
    tanh = 1.0 - 2.0 / (1.0 + tl.exp2(inner))
    return SOFTCAP * 1.4426950408889634 * tanh


@triton.jit
def merge_splits(
    partial_out,
    partial_lse,
    out_row,
    first_unit,
    num_splits,
    head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One head of one sequence: the splits' outputs, weighted by their sums of exponentials."""
    dims = tl.arange(0, BLOCK_D)
    biggest = -1.0e30
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        slot = (first_unit + splits).to(tl.int64) * NUM_HEADS + head
        inside = splits < num_splits
        both = inside[:, None] & (dims < HEAD_DIM)[None, :]
        # .cg: other multiprocessors wrote these; the L1 may hold what was there before.
        lse = tl.load(partial_lse + slot, inside, other=-1.0e30, cache_modifier=".cg")
        at = partial_out + slot[:, None] * HEAD_DIM + dims[None, :]
        part = tl.load(at, both, other=0.0, cache_modifier=".cg")
        new = tl.maximum(biggest, tl.max(lse, axis=0))
        decay = tl.exp2(biggest - new)
        weights = tl.exp2(lse - new)
        total = total * decay + tl.sum(weights, axis=0)
        acc = acc * decay + tl.sum(part * weights[:, None], axis=0)
        biggest = new
    at_out = out_row + head * HEAD_DIM + dims
    tl.store(at_out, (acc / total).to(out_row.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit
def decode_kernel(
    query,
    key_cache,
    value_cache,
    block_tables,
    lengths,
    units,
    out,
    partial_out,
    partial_lse,
    arrivals,
    stride_query,
    stride_block,
    stride_head,
    stride_table,
    stride_out,
    scale,
    value_scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    FUSED: tl.constexpr,
    PACKED: tl.constexpr,
    CONVERTS: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (KV head, unit). `scale` has log2 e in it, and the scale of fp8 keys.

    PACKED: the caches are pairs of float8_e4m3fn, as int16. Bytes can't be transposed on their way
    from shared memory to the matrix units, pairs can; so even and odd elements of the head go
    through products of their own, in float16, which holds every float8.
    """
    let_next_start(EARLY)
    kv_head = tl.program_id(0)
    unit = tl.program_id(1)
    request = tl.load(units + unit * 5)
    begin = tl.load(units + unit * 5 + 1)
    end = tl.load(units + unit * 5 + 2)
    num_splits = tl.load(units + unit * 5 + 3)
    first_unit = tl.load(units + unit * 5 + 4)
    STORED: tl.constexpr = HEAD_DIM // 2 if PACKED else HEAD_DIM
    # Keys before the window may be gone: their pages can belong to another sequence.
    oldest = begin
    if WINDOW > 0:
        oldest = tl.maximum(begin, tl.load(lengths + tl.maximum(request, 0)) - WINDOW)
    table = block_tables + request.to(tl.int64) * stride_table
    keys = key_cache + kv_head.to(tl.int64) * stride_head
    values = value_cache + kv_head.to(tl.int64) * stride_head
    wait_for_inputs(PDL)
    if request >= 0:
        rows = tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        heads = kv_head * GROUP + rows
        real = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        at = request.to(tl.int64) * stride_query + heads[:, None] * HEAD_DIM + dims[None, :]
        q = tl.load(query + at, mask=real, other=0.0)
        places = tl.arange(0, TILE)
        stored = dims
        if PACKED:
            stored = tl.arange(0, BLOCK_D // 2)
            halves, power = scale_rows(q)
            q_even, q_odd = tl.split(tl.reshape(halves, [BLOCK_M, BLOCK_D // 2, 2]))
            row_scale = power * scale
            acc_odd = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
        biggest = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D // 2 if PACKED else BLOCK_D], tl.float32)
        # The page of the next tile is carried: a load whose address hangs on another load of the
        # same iteration would get only one buffer of the pipeline.
        if PAGE % TILE == 0:
            pages = tl.load(table + begin // PAGE)
        else:
            pages = tl.load(table + tl.minimum(begin + places, end - 1) // PAGE)
        for start in tl.range(begin, end, TILE, num_stages=STAGES):
            # Outside [oldest, end) a neighbour is read instead, so that no load needs a mask and
            # no value that was never written meets a zero weight.
            position = tl.minimum(tl.maximum(start + places, oldest), end - 1)
            offset = pages.to(tl.int64) * stride_block + (position % PAGE) * STORED
            if PAGE % TILE == 0:
                pages = tl.load(table + tl.minimum(start + TILE, end - 1) // PAGE)
            else:
                pages = tl.load(table + tl.minimum(start + TILE + places, end - 1) // PAGE)
            places_d = offset[:, None] + stored[None, :]
            if BLOCK_D == HEAD_DIM:
                k = tl.load(keys + places_d)
                v = tl.load(values + places_d)
            else:
                k = tl.load(keys + places_d, mask=(stored < STORED)[None, :], other=0)
                v = tl.load(values + places_d, mask=(stored < STORED)[None, :], other=0)
            if PACKED:
                k_even, k_odd = halve_pairs(k, CONVERTS)
                scores = tl.dot(q_even, tl.trans(k_even))
                scores = tl.dot(q_odd, tl.trans(k_odd), scores) * row_scale[:, None]
            else:
                scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
            if SOFTCAP > 0:
                scores = cap_scores(scores, SOFTCAP)
            seen = (start + places >= oldest) & (start + places < end)
            scores = tl.where(seen[None, :], scores, -1.0e30)
            new = tl.maximum(biggest, tl.max(scores, axis=1))
            decay = tl.exp2(biggest - new)
            weights = tl.exp2(scores - new[:, None])
            total = total * decay + tl.sum(weights, axis=1)
            acc = acc * decay[:, None]
            if PACKED:
                v_even, v_odd = halve_pairs(v, CONVERTS)
                acc = tl.dot(weights.to(tl.float16), v_even, acc)
                acc_odd = tl.dot(weights.to(tl.float16), v_odd, acc_odd * decay[:, None])
            else:
                acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
            biggest = new
        if PACKED:
            acc = tl.interleave(acc, acc_odd)
        found = acc * (value_scale / tl.maximum(total, 1.0e-30))[:, None]
        if num_splits == 1:
            at_out = request.to(tl.int64) * stride_out + heads[:, None] * HEAD_DIM + dims[None, :]
            tl.store(out + at_out, found.to(out.dtype.element_ty), mask=real)
        else:
            slot = unit.to(tl.int64) * NUM_HEADS + heads
            tl.store(partial_out + slot[:, None] * HEAD_DIM + dims[None, :], found, mask=real)
            tl.store(partial_lse + slot, biggest + tl.log2(total), mask=rows < GROUP)
            if FUSED:
                # The last of a sequence's programs to arrive here combines all of them. The
                # barrier orders every thread's stores before the one thread's release.
                tl.debug_barrier()
                counter = arrivals + request * (NUM_HEADS // GROUP) + kv_head
                arrived = tl.atomic_add(counter, 1, sem="acq_rel")
                if arrived == num_splits - 1:
                    tl.store(counter, 0)
                    for row in range(GROUP):
                        merge_splits(
                            partial_out, partial_lse, out + request.to(tl.int64) * stride_out,
                            first_unit, num_splits, kv_head * GROUP + row, NUM_HEADS, HEAD_DIM,
                            BLOCK_D, BLOCK_S,
                        )  # fmt: skip


@triton.jit
def combine_kernel(
    requests,
    out,
    partial_out,
    partial_lse,
    stride_out,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (sequence, head): merges what decode_kernel without FUSED left in parts."""
    let_next_start(EARLY)
    request = tl.program_id(0)
    num_splits = tl.load(requests + request * 2 + 1)
    first = tl.load(requests + request * 2)
    wait_for_inputs(PDL)
    if num_splits > 1:
        merge_splits(
            partial_out, partial_lse, out + request.to(tl.int64) * stride_out, first, num_splits,
            tl.program_id(1), NUM_HEADS, HEAD_DIM, BLOCK_D, BLOCK_S,
        )  # fmt: skip


_launch_decode, _launch_combine = Launcher(decode_kernel), Launcher(combine_kernel)


def combine_splits(plan: DecodePlan, out: torch.Tensor, overlap: bool) -> None:
    """Merge the partial results that split sequences left in the plan into `out` [B, H, D]."""
    batch, num_heads, head_dim = out.shape
    _launch_combine(
        (batch, num_heads, 1),
        plan.requests,
        out,
        plan.partial_out,
        plan.partial_lse,
        out.stride(0),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_S=16,
        PDL=overlap,
        EARLY=overlap and starts_next_early(batch),
        num_warps=4,
        **launch_options(overlap),
    )


def paged_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: DecodePlan,
    out: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    warps: int = 4,
    stages: int | None = None,
    fused: bool | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """One query token per sequence against its pages, as `plan` (refilled for this step) says.

    Sequences of length 0 get zeros. It takes one launch, or two without `fused`. If `fused` is
    None, measurements decide.

    Args:
        query: [B, H, D], heads contiguous; rows may be strided (a view of the fused QKV).
        key_cache, value_cache: [N, K, P, D] of one layer, in the query's dtype or float8_e4m3fn.
        out: [B, H, D], heads contiguous.
        key_scale, value_scale: what stored fp8 values are multiplied by.
    """
    batch, num_heads, head_dim = query.shape
    _, num_kv_heads, page, _ = key_cache.shape
    assert query.stride(1) == out.stride(1) == head_dim
    assert key_cache.stride(2) == head_dim
    assert key_cache.stride() == value_cache.stride()
    assert page % plan.tile == 0 or plan.tile % page == 0
    packed = key_cache.dtype == torch.float8_e4m3fn and query.element_size() == 2
    if fused is None:
        fused = plan.fused
    if stages is None and not packed and key_cache.element_size() == 2:
        stages = plan.stages
    if fused is None:
        # One program merges many splits more slowly than a separate launch. At small batches every
        # sequence has many splits; at large ones few have any.
        fused = batch * num_kv_heads >= FUSE_FROM
    if stages is None:
        # Keys and values of every stage share the 227 KiB of a multiprocessor.
        tile_bytes = 2 * plan.tile * triton.next_power_of_2(head_dim) * key_cache.element_size()
        stages = min(4 if packed else 3, max(2, 200_000 // tile_bytes))
    group, block_d = num_heads // num_kv_heads, max(16, triton.next_power_of_2(head_dim))
    converts = False
    if packed:
        key_cache, value_cache = key_cache.view(torch.int16), value_cache.view(torch.int16)
        converts = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 9)
    _launch_decode(
        (num_kv_heads, plan.units.shape[0], 1),
        query,
        key_cache,
        value_cache,
        plan.block_tables,
        plan.lengths,
        plan.units,
        out,
        plan.partial_out,
        plan.partial_lse,
        plan.arrivals,
        query.stride(0),
        key_cache.stride(0),
        key_cache.stride(1),
        plan.block_tables.stride(0),
        out.stride(0),
        scale * key_scale * _LOG2E,
        value_scale,
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE=page,
        TILE=plan.tile,
        WINDOW=plan.window,
        SOFTCAP=softcap or 0.0,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        STAGES=stages,
        BLOCK_S=16,
        FUSED=fused,
        PACKED=packed,
        CONVERTS=converts,
        PDL=overlap,
        EARLY=overlap and starts_next_early(batch),
        num_warps=warps,
        **launch_options(overlap),
    )
    if not fused:
        combine_splits(plan, out, overlap)
    return out
