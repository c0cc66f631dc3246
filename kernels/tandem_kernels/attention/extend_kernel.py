"""Causal attention of prompt chunks over paged KV that may hold a cached prefix before them.

FlashAttention-2 (Dao, 2023) with tiles of at least 64 rows, so that the matrix units are used.
Keys that every row of a tile sees, those on the diagonal, and those at a window's edge are
separate loops: only the last two pay for a mask.
"""

import torch
import triton
import triton.language as tl

from tandem_kernels.attention.decode_kernel import cap_scores
from tandem_kernels.launch import Launcher

_LOG2E = 1.4426950408889634


@triton.jit
def _attend_tiles(
    acc, total, biggest, q, keys, values, table, rows, begin, end, last, oldest, scale,
    stride_block,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [begin, end), multiples of TILE; `last` is the last that exists."""
    places = tl.arange(0, TILE)
    dims = tl.arange(0, BLOCK_D)
    if PAGE % TILE == 0:
        pages = tl.load(table + tl.minimum(begin, last) // PAGE)
    else:
        pages = tl.load(table + tl.minimum(begin + places, last) // PAGE)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        position = start + places
        if MASKED:
            # A neighbour is read instead of what doesn't exist: a zero weight times NaN is NaN.
            position = tl.maximum(tl.minimum(position, last), oldest)
        offset = pages.to(tl.int64) * stride_block + (position % PAGE) * HEAD_DIM
        if PAGE % TILE == 0:
            pages = tl.load(table + tl.minimum(start + TILE, last) // PAGE)
        else:
            pages = tl.load(table + tl.minimum(start + TILE + places, last) // PAGE)
        at = offset[:, None] + dims[None, :]
        if BLOCK_D == HEAD_DIM:
            k = tl.load(keys + at)
            v = tl.load(values + at)
        else:
            k = tl.load(keys + at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(values + at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP > 0:
            scores = cap_scores(scores, SOFTCAP)
        if MASKED:
            seen = (start + places)[None, :] <= rows[:, None]
            if WINDOW > 0:
                seen = seen & ((start + places)[None, :] > rows[:, None] - WINDOW)
            scores = tl.where(seen, scores, -1.0e30)
        new = tl.maximum(biggest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new[:, None])
        if MASKED and WINDOW > 0:
            # A row may see nothing of a tile at the window's edge; its maximum is still -1e30.
            weights = tl.where(seen, weights, 0.0)
        decay = tl.exp2(biggest - new)
        total = total * decay + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        biggest = new
    return acc, total, biggest


@triton.jit(do_not_specialize=["stride_table"])
def extend_kernel(
    query,
    key_cache,
    value_cache,
    block_tables,
    starts,
    row_starts,
    out,
    stride_query,
    stride_block,
    stride_head,
    stride_table,
    stride_out,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (query head, tile of rows, chunk). `scale` has log2 e in it."""
    head = tl.program_id(0)
    chunk = tl.program_id(2)
    row_start = tl.load(row_starts + chunk)
    num_rows = tl.load(row_starts + chunk + 1) - row_start
    # The longest tiles start first, so that none of them is left over at the end.
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    if first_row < num_rows:
        start = tl.load(starts + chunk)
        kv_head = (head // GROUP).to(tl.int64)
        offsets = first_row + tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        rows = start + offsets
        real = (offsets < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
        flat = (row_start + offsets).to(tl.int64)[:, None]
        q = tl.load(
            query + flat * stride_query + head * HEAD_DIM + dims[None, :], mask=real, other=0.0
        )
        table = block_tables + chunk.to(tl.int64) * stride_table
        keys = key_cache + kv_head * stride_head
        values = value_cache + kv_head * stride_head
        last = start + tl.minimum(first_row + BLOCK_M, num_rows) - 1
        oldest = 0
        whole_from = 0
        if WINDOW > 0:
            oldest = tl.maximum(start + first_row - WINDOW + 1, 0)
            whole_from = tl.maximum((last - WINDOW + TILE) // TILE * TILE, 0)
        whole_to = (start + first_row + 1) // TILE * TILE
        biggest = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if WINDOW > 0:
            whole_from = tl.minimum(whole_from, last // TILE * TILE + TILE)
            acc, total, biggest = _attend_tiles(
                acc, total, biggest, q, keys, values, table, rows, oldest // TILE * TILE,
                whole_from, last, oldest, scale, stride_block, HEAD_DIM, BLOCK_D, PAGE, TILE,
                WINDOW, SOFTCAP, True, STAGES,
            )  # fmt: skip
        whole_to = tl.maximum(whole_to, whole_from)
        acc, total, biggest = _attend_tiles(
            acc, total, biggest, q, keys, values, table, rows, whole_from, whole_to, last, oldest,
            scale, stride_block, HEAD_DIM, BLOCK_D, PAGE, TILE, WINDOW, SOFTCAP, False, STAGES,
        )  # fmt: skip
        acc, total, biggest = _attend_tiles(
            acc, total, biggest, q, keys, values, table, rows, whole_to, last + 1, last, oldest,
            scale, stride_block, HEAD_DIM, BLOCK_D, PAGE, TILE, WINDOW, SOFTCAP, True, STAGES,
        )  # fmt: skip
        found = acc / tl.maximum(total, 1.0e-30)[:, None]
        at = out + flat * stride_out + head * HEAD_DIM + dims[None, :]
        tl.store(at, found.to(out.dtype.element_ty), mask=real)


_launch = Launcher(extend_kernel)


def paged_extend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    starts: torch.Tensor,
    row_starts: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
    *,
    block_m: int | None = None,
    tile: int | None = None,
    warps: int = 4,
    stages: int | None = None,
) -> torch.Tensor:
    """Several chunks at once, each against its own pages up to the row's own position.

    Args:
        query: [T, H, D], heads contiguous; the chunks' rows one after the other.
        key_cache, value_cache: [N, K, P, D] of one layer, with the chunks' own KV in it.
        block_tables: [C, M] int32.
        starts: [C] int32, position of each chunk's first row: the length of its cached prefix.
        row_starts: [C + 1] int32, running sum of the chunks' numbers of rows.
        longest: the largest number of rows in a chunk.
        block_m, tile: rows and keys at a time. The default in float32, whose products don't use
            the matrix units, is 32 each: with 64, heads of 256 take a minute to compile.
    """
    block_m, tile = (side or (32 if query.element_size() == 4 else 64) for side in (block_m, tile))
    num_tokens, num_heads, head_dim = query.shape
    _, num_kv_heads, page, _ = key_cache.shape
    if out is None:
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    assert query.stride(1) == out.stride(1) == head_dim
    assert key_cache.stride(2) == head_dim
    assert key_cache.stride() == value_cache.stride()
    assert page % tile == 0 or tile % page == 0
    if stages is None:
        # Keys and values of every stage share the 227 KiB of a multiprocessor with the queries.
        row_bytes = triton.next_power_of_2(head_dim) * query.element_size()
        stages = min(3, max(1, (200_000 - block_m * row_bytes) // (2 * tile * row_bytes)))
    block_m = min(block_m, max(16, triton.next_power_of_2(longest)))
    _launch(
        (num_heads, triton.cdiv(longest, block_m), starts.shape[0]),
        query,
        key_cache,
        value_cache,
        block_tables,
        starts,
        row_starts,
        out,
        query.stride(0),
        key_cache.stride(0),
        key_cache.stride(1),
        block_tables.stride(0),
        out.stride(0),
        scale * _LOG2E,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE=page,
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        BLOCK_M=block_m,
        TILE=tile,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        STAGES=stages,
        num_warps=warps,
    )
    return out
