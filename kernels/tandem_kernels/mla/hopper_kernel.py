"""MLA decode for 64 heads and more on Hopper, in Gluon: compute-bound, so scheduled by hand.

With 64 rows, Triton's own pipeliner compiles `decode_kernel` so that each of the two warp groups
computes all scores, and a tile begins to load only when the one before it has been used up. Here
the warp groups share the columns of both products, and the next tile loads while this one is
computed. A program's layout (64 heads, 64 positions, two tiles in shared memory) is FlashMLA's.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _load_tile(
    cache, page, start, last, wanted, latents, keys, stride_block,
    RANK: gl.constexpr,
    ROPE: gl.constexpr,
    PAGE: gl.constexpr,
    TILE: gl.constexpr,
    WIDE: gl.constexpr,
    NARROW: gl.constexpr,
):  # fmt: skip
    """Begin to copy a tile's latents and rotated keys into shared memory."""
    base = cache + page.to(gl.int64) * stride_block + (start % PAGE) * (RANK + ROPE)
    # Past the end a neighbour is read instead: a value never written may be NaN.
    rows = gl.minimum(gl.arange(0, TILE, layout=gl.SliceLayout(1, WIDE)), last - start)
    columns = gl.arange(0, RANK, layout=gl.SliceLayout(0, WIDE))
    at = rows[:, None] * (RANK + ROPE) + columns[None, :]
    async_copy.async_copy_global_to_shared(latents, base + at, mask=wanted)
    rows = gl.minimum(gl.arange(0, TILE, layout=gl.SliceLayout(1, NARROW)), last - start)
    columns = gl.arange(0, ROPE, layout=gl.SliceLayout(0, NARROW))
    at = rows[:, None] * (RANK + ROPE) + RANK + columns[None, :]
    async_copy.async_copy_global_to_shared(keys, base + at, mask=wanted)


@gluon.jit
def mla_hopper_kernel(
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
    NUM_HEADS: gl.constexpr,
    RANK: gl.constexpr,
    ROPE: gl.constexpr,
    PAGE: gl.constexpr,
    TILE: gl.constexpr,
    BLOCK_H: gl.constexpr,
):
    """Program (block of heads, unit), 8 warps. `scale` has log2 e in it."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, TILE // 2, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, RANK // 2, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = cache.dtype.element_ty
    unit = gl.program_id(1)
    request = gl.load(units + unit * 5).to(gl.int64)
    begin = gl.load(units + unit * 5 + 1)
    end = gl.load(units + unit * 5 + 2)
    num_splits = gl.load(units + unit * 5 + 3)
    if request >= 0:
        first_head = gl.program_id(0) * BLOCK_H
        q = gl.allocate_shared_memory(dtype, [BLOCK_H, RANK], SHARED)
        r = gl.allocate_shared_memory(dtype, [BLOCK_H, ROPE], SHARED)
        latents = gl.allocate_shared_memory(dtype, [2, TILE, RANK], SHARED)
        keys = gl.allocate_shared_memory(dtype, [2, TILE, ROPE], SHARED)
        heads = first_head + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, WIDE))
        columns = gl.arange(0, RANK, layout=gl.SliceLayout(0, WIDE))
        at = latent_query + request * stride_latent
        at = at + heads[:, None] * stride_latent_head + columns[None, :]
        async_copy.async_copy_global_to_shared(q, at)
        heads = first_head + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, NARROW))
        columns = gl.arange(0, ROPE, layout=gl.SliceLayout(0, NARROW))
        at = rope_query + request * stride_rope
        at = at + heads[:, None] * stride_rope_head + columns[None, :]
        async_copy.async_copy_global_to_shared(r, at)
        table = block_tables + request * stride_table
        last = gl.maximum(end - 1, 0)
        page = gl.load(table + begin // PAGE)
        _load_tile(
            cache, page, begin, last, begin < end, latents.index(0), keys.index(0), stride_block,
            RANK, ROPE, PAGE, TILE, WIDE, NARROW,
        )  # fmt: skip
        async_copy.commit_group()
        page = gl.load(table + gl.minimum(begin + TILE, last) // PAGE)
        places = gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
        biggest = gl.full([BLOCK_H], -1.0e30, gl.float32, gl.SliceLayout(1, SCORES))
        totals = gl.full([BLOCK_H, TILE], 0.0, gl.float32, SCORES)
        acc = gl.full([BLOCK_H, RANK], 0.0, gl.float32, VALUES)
        turn = 0
        for start in range(begin, end, TILE):
            tile = latents.index(turn)
            async_copy.wait_group(0)
            fence_async_shared()
            zeros = gl.full([BLOCK_H, TILE], 0.0, gl.float32, SCORES)
            scores = warpgroup_mma(r, keys.index(turn).permute((1, 0)), zeros, is_async=True)
            scores = warpgroup_mma(q, tile.permute((1, 0)), scores, is_async=True)
            # The tile before is done with: its place is filled while this one is computed.
            upcoming = start + TILE
            turn = 1 - turn
            # Predicated, not skipped: around a branch the products would not stay asynchronous.
            _load_tile(
                cache, page, upcoming, last, upcoming < end, latents.index(turn), keys.index(turn),
                stride_block, RANK, ROPE, PAGE, TILE, WIDE, NARROW,
            )  # fmt: skip
            async_copy.commit_group()
            page = gl.load(table + gl.minimum(upcoming + TILE, last) // PAGE)
            scores = warpgroup_mma_wait(0, deps=[scores]) * scale
            scores = gl.where((start + places < end)[None, :], scores, -1.0e30)
            new = gl.maximum(biggest, gl.max(scores, axis=1))
            decay = gl.exp2(biggest - new)
            weights = gl.exp2(scores - new[:, None])
            biggest = new
            totals = totals * decay[:, None] + weights
            factors = gl.convert_layout(decay, gl.SliceLayout(1, VALUES))
            left = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, VALUES, 2))
            acc = warpgroup_mma(left, tile, acc * factors[:, None], is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
        async_copy.wait_group(0)
        total = gl.sum(totals, axis=1)
        lse = gl.convert_layout(biggest + gl.log2(total), gl.SliceLayout(1, VALUES))
        share = gl.convert_layout(1.0 / gl.maximum(total, 1.0e-30), gl.SliceLayout(1, VALUES))
        found = acc * share[:, None]
        heads = first_head + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, VALUES))
        columns = gl.arange(0, RANK, layout=gl.SliceLayout(0, VALUES))
        if num_splits == 1:
            row = out + request * stride_out
            gl.store(row + heads[:, None] * RANK + columns[None, :], found.to(out.dtype.element_ty))
        else:
            slot = unit.to(gl.int64) * NUM_HEADS + heads
            gl.store(partial_out + slot[:, None] * RANK + columns[None, :], found)
            gl.store(partial_lse + slot, lse)
