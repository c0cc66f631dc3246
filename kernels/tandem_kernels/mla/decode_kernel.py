"""MLA decode over paged latents: each page is read once, as keys and as values.

`attention.split_plan` splits the keys, and all of a program's heads are in one matrix product. Up
to 32 heads, the products are transposed, so that tokens and latent dimensions, of which there are
many, fill the 64 rows of Hopper's matrix unit, and the few heads are its columns. With 64 heads or
more, a program takes 64 of them as rows; on Hopper `hopper_kernel` does that where it can. Scores
are in base 2.
"""

from typing import Literal

import torch
import triton
import triton.language as tl

from tandem_kernels.attention.decode_kernel import combine_splits
from tandem_kernels.attention.split_plan import DecodePlan, make_decode_plan
from tandem_kernels.launch import KNOWS_GLUON
from tandem_kernels.overlap import launch_options, wait_for_inputs

_LOG2E = 1.4426950408889634

HEADS_PER_PROGRAM = 64
MOST_COLUMNS = 32

Kind = Literal["columns", "rows", "hopper"]
"""Heads are columns of the products, or rows; or the kernel for Hopper is used."""


@triton.jit
def mla_decode_kernel(
    latent_query,
    rope_query,
    cache,
    block_tables,
    units,
    out,
    partial_out,
    partial_lse,
    stride_latent,
    stride_latent_head,
    stride_rope,
    stride_rope_head,
    stride_block,
    stride_table,
    stride_out,
    scale,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HEADS_LAST: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (block of heads, unit). `scale` has log2 e in it."""
    unit = tl.program_id(1)
    request = tl.load(units + unit * 5).to(tl.int64)
    begin = tl.load(units + unit * 5 + 1)
    end = tl.load(units + unit * 5 + 2)
    num_splits = tl.load(units + unit * 5 + 3)
    wait_for_inputs(PDL)
    if request >= 0:
        heads = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
        ranks = tl.arange(0, BLOCK_R)
        ropes = tl.arange(0, BLOCK_P)
        places = tl.arange(0, TILE)
        latent_row = latent_query + request * stride_latent
        rope_row = rope_query + request * stride_rope
        q = tl.load(
            latent_row + heads[:, None] * stride_latent_head + ranks[None, :],
            mask=(heads < NUM_HEADS)[:, None] & (ranks < RANK)[None, :],
            other=0.0,
        )
        r = tl.load(
            rope_row + heads[:, None] * stride_rope_head + ropes[None, :],
            mask=(heads < NUM_HEADS)[:, None] & (ropes < ROPE)[None, :],
            other=0.0,
        )
        table = block_tables + request * stride_table
        biggest = tl.full([BLOCK_H], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        if HEADS_LAST:
            acc = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
        else:
            acc = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
        # The page of the next tile is carried: a load whose address hangs on another load of the
        # same iteration would get only one buffer of the pipeline.
        last = tl.maximum(end - 1, 0)
        if PAGE % TILE == 0:
            pages = tl.load(table + begin // PAGE)
        else:
            pages = tl.load(table + tl.minimum(begin + places, last) // PAGE)
        for start in tl.range(begin, end, TILE, num_stages=STAGES):
            # Past the end a neighbour is read instead, so that no load needs a mask and no value
            # that was never written meets a zero weight.
            position = tl.minimum(start + places, last)
            row = pages.to(tl.int64) * stride_block + (position % PAGE) * (RANK + ROPE)
            if PAGE % TILE == 0:
                pages = tl.load(table + tl.minimum(start + TILE, last) // PAGE)
            else:
                pages = tl.load(table + tl.minimum(start + TILE + places, last) // PAGE)
            at = cache + row[:, None] + ranks[None, :]
            if BLOCK_R == RANK:
                latents = tl.load(at)
            else:
                latents = tl.load(at, mask=(ranks < RANK)[None, :], other=0.0)
            at = cache + row[:, None] + RANK + ropes[None, :]
            if BLOCK_P == ROPE:
                keys = tl.load(at)
            else:
                keys = tl.load(at, mask=(ropes < ROPE)[None, :], other=0.0)
            seen = start + places < end
            if HEADS_LAST:
                scores = tl.dot(latents, tl.trans(q), input_precision="ieee")
                scores = tl.dot(keys, tl.trans(r), scores, input_precision="ieee") * scale
                scores = tl.where(seen[:, None], scores, -1.0e30)
                new = tl.maximum(biggest, tl.max(scores, axis=0))
                decay = tl.exp2(biggest - new)
                weights = tl.exp2(scores - new[None, :])
                total = total * decay + tl.sum(weights, axis=0)
                acc = acc * decay[None, :]
                acc = tl.dot(
                    tl.trans(latents), weights.to(latents.dtype), acc, input_precision="ieee"
                )
            else:
                scores = tl.dot(q, tl.trans(latents), input_precision="ieee")
                scores = tl.dot(r, tl.trans(keys), scores, input_precision="ieee") * scale
                scores = tl.where(seen[None, :], scores, -1.0e30)
                new = tl.maximum(biggest, tl.max(scores, axis=1))
                decay = tl.exp2(biggest - new)
                weights = tl.exp2(scores - new[:, None])
                total = total * decay + tl.sum(weights, axis=1)
                acc = acc * decay[:, None]
                acc = tl.dot(weights.to(latents.dtype), latents, acc, input_precision="ieee")
            biggest = new
        share = 1.0 / tl.maximum(total, 1.0e-30)
        if HEADS_LAST:
            found = acc * share[None, :]
            real = (heads < NUM_HEADS)[None, :] & (ranks < RANK)[:, None]
            at_head = heads[None, :]
            at_rank = ranks[:, None]
        else:
            found = acc * share[:, None]
            real = (heads < NUM_HEADS)[:, None] & (ranks < RANK)[None, :]
            at_head = heads[:, None]
            at_rank = ranks[None, :]
        if num_splits == 1:
            at = out + request * stride_out + at_head * RANK + at_rank
            tl.store(at, found.to(out.dtype.element_ty), mask=real)
        else:
            slot = unit.to(tl.int64) * NUM_HEADS
            tl.store(partial_out + (slot + at_head) * RANK + at_rank, found, mask=real)
            lse = biggest + tl.log2(total)
            tl.store(partial_lse + slot + heads, lse, mask=heads < NUM_HEADS)


def make_mla_plan(
    lengths: torch.Tensor,
    block_tables: torch.Tensor,
    num_heads: int,
    rank: int,
    *,
    tile: int | None = None,
    programs: int = 132,
    min_tiles: int | None = None,
) -> DecodePlan:
    """A `DecodePlan` for `paged_mla_decode`: blocks of heads take the place of KV heads.

    The defaults were the fastest on an H100.

    Args:
        lengths: [B] int32; block_tables: [B, M] int32. Both are kept and read at each refill.
        tile: positions per tile; must divide the page size, or be a multiple of it.
        programs: the number of programs that fill the device once.
        min_tiles: the smallest split, in tiles.
    """
    head_blocks = triton.cdiv(num_heads, HEADS_PER_PROGRAM)
    few = num_heads <= MOST_COLUMNS
    if lengths.shape[0] * head_blocks >= 0.8 * programs:
        # Whole sequences fill the device: only one twice as long as the others is worth a cut.
        programs //= 2
    return make_decode_plan(
        lengths,
        block_tables,
        num_heads,
        head_blocks,
        rank,
        tile=tile or (32 if few else 64),
        programs=programs,
        min_tiles=min_tiles or (4 if few else 2),
    )


def _choose_kind(
    latent_query: torch.Tensor, rope_query: torch.Tensor, cache: torch.Tensor, plan: DecodePlan
) -> Kind:
    """Columns for few heads; the kernel for Hopper only for DeepSeek's sizes."""
    if latent_query.shape[1] <= MOST_COLUMNS:
        return "columns"
    suits_hopper = (
        latent_query.is_cuda
        and KNOWS_GLUON
        and torch.cuda.get_device_capability(latent_query.device)[0] == 9
        and latent_query.element_size() == cache.element_size() == 2
        and latent_query.shape[1] % HEADS_PER_PROGRAM == 0
        and (latent_query.shape[2], rope_query.shape[2]) == (512, 64)
        and plan.tile == 64
        and cache.shape[2] % plan.tile == 0
    )
    return "hopper" if suits_hopper else "rows"


def _choose_stages(kind: Kind, tile: int, block_h: int, row_bytes: int, itemsize: int) -> int:
    """Each stage holds a tile, and shares the 227 KiB of a multiprocessor with the queries."""
    stages = min(4, max(1, (226_000 - block_h * row_bytes) // (tile * row_bytes)))
    # Triton 3.6 gives wrong results for the transposed products without a pipeline.
    return max(2, stages) if kind == "columns" and itemsize == 2 else stages


def paged_mla_decode(
    latent_query: torch.Tensor,
    rope_query: torch.Tensor,
    cache: torch.Tensor,
    plan: DecodePlan,
    out: torch.Tensor,
    scale: float,
    *,
    kind: Kind | None = None,
    warps: int | None = None,
    stages: int | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """One query token per sequence over its latents, as `plan` (refilled for this step) says.

    Sequences of length 0 get zeros. It takes two launches, whatever the lengths.

    Args:
        latent_query: [B, H, R], R contiguous; rope_query: [B, H, P], P contiguous.
        cache: [N, 1, G, R + P] of one layer, its pages contiguous.
        plan: from `make_mla_plan`.
        out: [B, H, R], heads contiguous.
        kind: which kernel to use; if None, measurements decide.
    """
    _, num_heads, rank = latent_query.shape
    rope, page = rope_query.shape[2], cache.shape[2]
    assert cache.shape[3] == cache.stride(2) == rank + rope
    assert latent_query.stride(2) == rope_query.stride(2) == out.stride(2) == 1
    assert out.stride(1) == rank
    assert page % plan.tile == 0 or plan.tile % page == 0
    kind = kind or _choose_kind(latent_query, rope_query, cache, plan)
    block_h = max(16, min(HEADS_PER_PROGRAM, triton.next_power_of_2(num_heads)))
    grid = (triton.cdiv(num_heads, block_h), plan.units.shape[0])
    # fmt: off
    arguments = (
        latent_query, rope_query, cache, plan.block_tables, plan.units,
        out, plan.partial_out, plan.partial_lse,
        latent_query.stride(0), latent_query.stride(1), rope_query.stride(0), rope_query.stride(1),
        cache.stride(0), plan.block_tables.stride(0), out.stride(0), scale * _LOG2E,
        num_heads, rank, rope, page, plan.tile, block_h,
    )
    # fmt: on
    if kind == "hopper":
        from tandem_kernels.mla.hopper_kernel import mla_hopper_kernel

        mla_hopper_kernel[grid](*arguments, num_warps=8)
    else:
        block_r = max(16, triton.next_power_of_2(rank))
        block_p, size = max(16, triton.next_power_of_2(rope)), cache.element_size()
        row_bytes = (block_r + block_p) * size
        mla_decode_kernel[grid](
            *arguments,
            BLOCK_R=block_r,
            BLOCK_P=block_p,
            HEADS_LAST=kind == "columns",
            STAGES=stages or _choose_stages(kind, plan.tile, block_h, row_bytes, size),
            PDL=overlap,
            num_warps=warps or (4 if kind == "columns" else 8),
            **launch_options(overlap),
        )
    combine_splits(plan, out, overlap)
    return out
