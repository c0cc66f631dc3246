"""Prefill attention over pages on Hopper, in Gluon: warps of different roles, scheduled by hand.

The shape of FlashAttention-3 (Shah et al., 2024): one warp has the copy engine bring pages into
shared memory, two warpgroups of 64 rows each compute, and within each the softmax of one tile of
keys runs beside the matrix products of its neighbours. Programs stay on their multiprocessor and
take tile after tile of rows, so that the next tile's queries and keys load during the last one's
end.

Tiles of keys are walked backwards from the diagonal: only the first ones, and those at a window's
edge, pay for a mask, and a row has met a key before it meets a tile that it sees nothing of.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _find_rows(turn, tiles, num_heads, num_tiles):
    """What a program does at its `turn`: (head, chunk, first row, row start, rows, start)."""
    # Every second turn goes the other way round, so that all programs get as much to do.
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    place = gl.where(turn % 2 == 0, place, programs - 1 - place)
    tile = turn * programs + place
    at = tiles + gl.minimum(tile, num_tiles - 1) // num_heads * 5
    chunk = gl.load(at)
    first = gl.load(at + 1)
    row_start = gl.load(at + 2)
    num_rows = gl.load(at + 3)
    start = gl.load(at + 4)
    num_rows = gl.where(tile < num_tiles, num_rows, 0)
    return tile % num_heads, chunk, first, row_start, num_rows, start


@gluon.jit
def _load_tile(
    pages, table, tile, last, row, tiles, ready, free, count, stride_row,
    HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Have a tile of keys or values copied once its place is free; `row` is of page 0's head."""
    columns: gl.constexpr = HEAD_DIM // 64
    parts: gl.constexpr = TILE // 64
    most = last // 64 * 64  # it is read instead of a page that doesn't exist
    first = gl.minimum(tile * TILE, most)
    second = gl.minimum(tile * TILE + 64, most)
    first = row + gl.load(table + first // PAGE) * stride_row + first % PAGE
    if parts == 2:
        second = row + gl.load(table + second // PAGE) * stride_row + second % PAGE
    stage = count % STAGES
    mbarrier.wait(free.index(stage), (count // STAGES + 1) & 1)
    bar = ready.index(stage)
    mbarrier.expect(bar, TILE * HEAD_DIM * 2)
    # Columns lie in blocks of 64, and in each the rows of all the tile's pages.
    boxes = tiles._reinterpret(tiles.dtype, [STAGES * columns * parts, 64, 64], tiles.layout)
    box = stage * (columns * parts)
    for column in gl.static_range(columns):
        at = box + column * parts
        tma.async_copy_global_to_shared(pages, [first, column * 64], bar, boxes.index(at))
        if parts == 2:
            tma.async_copy_global_to_shared(pages, [second, column * 64], bar, boxes.index(at + 1))


@gluon.jit
def _produce(
    pages, tables, tiles, keys, values, bars, num_heads, group, num_tiles, turns,
    stride_table, stride_row, key_row, value_row,
    HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr,
    WINDOW: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: for each tile of rows its keys and values, backwards."""
    k_ready, k_free, v_ready, v_free = bars
    count = 0
    for turn in range(turns):
        head, chunk, first, _row_start, num_rows, start = _find_rows(
            turn, tiles, num_heads, num_tiles
        )
        if first < num_rows:
            table = tables + chunk.to(gl.int64) * stride_table
            row = (head // group) * PAGE
            last = start + gl.minimum(first + BLOCK_M, num_rows) - 1
            oldest = 0
            if WINDOW > 0:
                oldest = gl.maximum(start + first - WINDOW + 1, 0) // TILE
            top = last // TILE
            _load_tile(
                pages, table, top, last, row + key_row, keys, k_ready, k_free, count, stride_row,
                HEAD_DIM, PAGE, TILE, STAGES,
            )  # fmt: skip
            for below in range(top - oldest):
                tile = top - 1 - below
                # The keys of a tile are needed before the values of the one above it.
                _load_tile(
                    pages, table, tile, last, row + key_row, keys, k_ready, k_free, count + 1,
                    stride_row, HEAD_DIM, PAGE, TILE, STAGES,
                )  # fmt: skip
                _load_tile(
                    pages, table, tile + 1, last, row + value_row, values, v_ready, v_free, count,
                    stride_row, HEAD_DIM, PAGE, TILE, STAGES,
                )  # fmt: skip
                count += 1
            _load_tile(
                pages, table, oldest, last, row + value_row, values, v_ready, v_free, count,
                stride_row, HEAD_DIM, PAGE, TILE, STAGES,
            )  # fmt: skip
            count += 1


@gluon.jit
def _load_query(
    query, tile, head, first, row_start, num_rows, stride_query, SIDE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Begin to copy a warpgroup's 64 rows into shared memory; rows past the end become zeros."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    offsets = first + SIDE * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, WIDE))
    flat = (row_start + offsets).to(gl.int64)
    at = query + flat[:, None] * stride_query + (head * HEAD_DIM + dims)[None, :]
    real = (offsets < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    async_copy.async_copy_global_to_shared(tile, at, mask=real)
    async_copy.commit_group()


@gluon.jit
def _weigh(
    scores, biggest, total, rows, places, scale, WINDOW: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """Online softmax: (weights, factor of what was found before, new maximum, new total)."""
    if MASKED:
        seen = places[None, :] <= rows[:, None]
        if WINDOW > 0:
            seen = seen & (places[None, :] > rows[:, None] - WINDOW)
        scores = gl.where(seen, scores, -1.0e30)
    new = gl.maximum(biggest, gl.max(scores, axis=1))
    decay = gl.exp2((biggest - new) * scale)
    shift = new * scale
    if MASKED:
        # Where no key was met yet: the mask's value times scale, less that rounded, may be 1e22.
        shift = gl.where(new > -1.0e30, shift, 0.0)
    weights = gl.exp2(scores * scale - shift[:, None])
    total = total * decay + gl.sum(weights, axis=1)
    return weights, decay, new, total


@gluon.jit
def _attend_tiles(
    acc, found, biggest, total, begin, end, rows, q, keys, values, bars, count, scale,
    WINDOW: gl.constexpr,
    MASKED: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    SCORES: gl.constexpr,
    LEFT: gl.constexpr,
):  # fmt: skip
    """Tiles [begin, end) from the last to the first; `found` are the weights of the one above."""
    k_ready, k_free, v_ready, v_free = bars
    zeros = gl.full([64, TILE], 0.0, gl.float32, SCORES)
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
    for below in range(end - begin):
        tile = end - 1 - below
        weights = gl.convert_layout(found.to(q.dtype), LEFT)
        stage = (count + 1) % STAGES
        mbarrier.wait(k_ready.index(stage), ((count + 1) // STAGES) & 1)
        k = keys.index(stage).permute((1, 0))
        scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        before = count % STAGES
        mbarrier.wait(v_ready.index(before), (count // STAGES) & 1)
        acc = warpgroup_mma(weights, values.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        found, decay, biggest, total = _weigh(
            scores, biggest, total, rows, tile * TILE + columns, scale, WINDOW, MASKED
        )
        # Long fulfilled, but it ends a basic block: the assembler would move the softmax behind
        # the wait for the product that it is to run beside.
        mbarrier.wait(v_ready.index(before), (count // STAGES) & 1)
        acc, found, weights = warpgroup_mma_wait(0, deps=[acc, found, weights])
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
        count += 1
    return acc, found, biggest, total, count


@gluon.jit
def _clear_end(
    values, stage, tile, last,
    HEAD_DIM: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Zeros for the values past the end: one never written may be NaN, and zero times NaN is too.

    Both warpgroups do it, each before it reads them, and write the same.
    """
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    boxes: gl.constexpr = TILE * HEAD_DIM // 4096
    parts = values._reinterpret(values.dtype, [STAGES * boxes, 64, 64], values.layout)
    places = gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
    for box in gl.static_range(boxes):
        part = parts.index(stage * boxes + box)
        real = tile * TILE + (box % (TILE // 64)) * 64 + places <= last
        v = part.load(WIDE)
        part.store(gl.where(real[:, None], v, gl.full_like(v, 0.0)))
    fence_async_shared()


@gluon.jit
def _consume(
    query, out, tiles, queries, keys, values, bars, num_heads, num_tiles, turns,
    stride_query, stride_out, scale,
    SIDE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    WINDOW: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup: rows [64 · SIDE, 64 · SIDE + 64) of each tile of rows."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    FOUND: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, FOUND, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    k_ready, k_free, v_ready, v_free = bars
    q = queries.index(SIDE)
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
    zeros = gl.full([64, TILE], 0.0, gl.float32, SCORES)
    count = 0
    head, _chunk, first, row_start, num_rows, start = _find_rows(0, tiles, num_heads, num_tiles)
    _load_query(query, q, head, first, row_start, num_rows, stride_query, SIDE, HEAD_DIM)
    for turn in range(turns):
        low = start + first + SIDE * 64
        rows = low + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
        last = start + gl.minimum(first + BLOCK_M, num_rows) - 1
        top = last // TILE
        next_head, _chunk, next_first, next_row_start, next_num_rows, next_start = _find_rows(
            turn + 1, tiles, num_heads, num_tiles
        )
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        biggest = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.full([64, HEAD_DIM], 0.0, gl.float32, FOUND)
        if first < num_rows:
            stage = count % STAGES
            mbarrier.wait(k_ready.index(stage), (count // STAGES) & 1)
            k = keys.index(stage).permute((1, 0))
            scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_free.index(stage), count=1)
            found, _decay, biggest, total = _weigh(
                scores, biggest, total, rows, top * TILE + columns, scale, WINDOW, True
            )
            if (top + 1) * TILE > start + num_rows:
                mbarrier.wait(v_ready.index(stage), (count // STAGES) & 1)
                _clear_end(values, stage, top, start + num_rows - 1, HEAD_DIM, TILE, STAGES)
                gl.thread_barrier()
            whole = gl.minimum((low + 1) // TILE, top)
            oldest = 0
            edge = 0
            if WINDOW > 0:
                oldest = gl.maximum(start + first - WINDOW + 1, 0) // TILE
                edge = gl.maximum(low + 63 - WINDOW + TILE, 0) // TILE
                edge = gl.minimum(gl.maximum(edge, oldest), top)
                whole = gl.maximum(whole, edge)
            acc, found, biggest, total, count = _attend_tiles(
                acc, found, biggest, total, whole, top, rows, q, keys, values, bars, count,
                scale, WINDOW, True, TILE, STAGES, SCORES, LEFT,
            )  # fmt: skip
            acc, found, biggest, total, count = _attend_tiles(
                acc, found, biggest, total, edge, whole, rows, q, keys, values, bars, count,
                scale, WINDOW, False, TILE, STAGES, SCORES, LEFT,
            )  # fmt: skip
            if WINDOW > 0:
                acc, found, biggest, total, count = _attend_tiles(
                    acc, found, biggest, total, oldest, edge, rows, q, keys, values, bars, count,
                    scale, WINDOW, True, TILE, STAGES, SCORES, LEFT,
                )  # fmt: skip
            weights = gl.convert_layout(found.to(q.dtype), LEFT)
            stage = count % STAGES
            mbarrier.wait(v_ready.index(stage), (count // STAGES) & 1)
            acc = warpgroup_mma(weights, values.index(stage), acc, is_async=True)
            gl.thread_barrier()
            _load_query(
                query, q, next_head, next_first, next_row_start, next_num_rows, stride_query,
                SIDE, HEAD_DIM,
            )  # fmt: skip
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
            mbarrier.arrive(v_free.index(stage), count=1)
            count += 1
            share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, FOUND))
            wide = gl.convert_layout((acc * share[:, None]).to(out.dtype.element_ty), WIDE)
            offsets = first + SIDE * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
            dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, WIDE))
            flat = (row_start + offsets).to(gl.int64)
            at = out + flat[:, None] * stride_out + (head * HEAD_DIM + dims)[None, :]
            gl.store(at, wide, mask=(offsets < num_rows)[:, None])
        else:
            _load_query(
                query, q, next_head, next_first, next_row_start, next_num_rows, stride_query,
                SIDE, HEAD_DIM,
            )  # fmt: skip
        head, first, row_start = next_head, next_first, next_row_start
        num_rows, start = next_num_rows, next_start
    async_copy.wait_group(0)


@gluon.jit(
    do_not_specialize=[
        "num_heads", "group", "num_tiles", "turns", "stride_table", "stride_row",
        "key_row", "value_row",
    ]
)  # fmt: skip
def hopper_extend_kernel(
    query,
    pages,
    block_tables,
    tiles,
    out,
    num_heads,
    group,
    num_tiles,
    turns,
    stride_query,
    stride_table,
    stride_row,
    stride_out,
    key_row,
    value_row,
    scale,
    HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr,
    WINDOW: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A program takes tiles of 128 rows in turns. `scale` has log2 e in it.

    Args:
        pages: descriptor of rows [R, D] in boxes of [64, 64]; those of keys begin at `key_row`,
            those of values at `value_row`, and each block of them is `stride_row` rows.
        tiles: [num_tiles / num_heads, 5] int32 as `plan_tiles` makes them.
    """
    BLOCK_M: gl.constexpr = 128
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = pages.dtype
    queries = gl.allocate_shared_memory(dtype, [2, 64, HEAD_DIM], SHARED)
    keys = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], SHARED)
    values = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], SHARED)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)
    bars = (k_ready, k_free, v_ready, v_free)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    query, out, tiles, queries, keys, values, bars, num_heads, num_tiles,
                    turns, stride_query, stride_out, scale, 0, HEAD_DIM,
                    WINDOW, BLOCK_M, TILE, STAGES,
                ),
            ),
            (
                _consume,
                (
                    query, out, tiles, queries, keys, values, bars, num_heads, num_tiles,
                    turns, stride_query, stride_out, scale, 1, HEAD_DIM,
                    WINDOW, BLOCK_M, TILE, STAGES,
                ),
            ),
            (
                _produce,
                (
                    pages, block_tables, tiles, keys, values, bars, num_heads, group, num_tiles,
                    turns, stride_table, stride_row, key_row,
                    value_row, HEAD_DIM, PAGE, WINDOW, BLOCK_M, TILE, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
