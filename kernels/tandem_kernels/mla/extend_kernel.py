"""Causal attention of a prompt chunk over projected latents.

FlashAttention-2 (Dao, 2023) as in `attention.extend_kernel`, but with keys in two parts: each
head's own, which lies beside its values as the up-projection leaves them, and the rotated one that
all heads share. Nothing is concatenated.
"""

import torch
import triton
import triton.language as tl

_LOG2E = 1.4426950408889634


@triton.jit
def _attend_tiles(
    acc, total, biggest, q, r, projected, rope_keys, rows, begin, end, last, scale,
    stride_key, stride_rope,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [begin, end), begin a multiple of TILE; `last` exists."""
    places = tl.arange(0, TILE)
    dims = tl.arange(0, BLOCK_C)
    ropes = tl.arange(0, BLOCK_P)
    outs = tl.arange(0, BLOCK_V)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        position = start + places
        if MASKED:
            position = tl.minimum(position, last)
        row = projected + position.to(tl.int64)[:, None] * stride_key
        shared = rope_keys + position.to(tl.int64)[:, None] * stride_rope + ropes[None, :]
        if BLOCK_C == NOPE:
            k = tl.load(row + dims[None, :])
        else:
            k = tl.load(row + dims[None, :], mask=(dims < NOPE)[None, :], other=0.0)
        if BLOCK_P == ROPE:
            kr = tl.load(shared)
        else:
            kr = tl.load(shared, mask=(ropes < ROPE)[None, :], other=0.0)
        if BLOCK_V == VALUE:
            v = tl.load(row + NOPE + outs[None, :])
        else:
            v = tl.load(row + NOPE + outs[None, :], mask=(outs < VALUE)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.dot(r, tl.trans(kr), scores, input_precision="ieee") * scale
        if MASKED:
            scores = tl.where((start + places)[None, :] <= rows[:, None], scores, -1.0e30)
        new = tl.maximum(biggest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new[:, None])
        decay = tl.exp2(biggest - new)
        total = total * decay + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        biggest = new
    return acc, total, biggest


@triton.jit(do_not_specialize=["start", "num_rows"])
def mla_extend_kernel(
    query,
    projected,
    rope_keys,
    out,
    start,
    num_rows,
    stride_query,
    stride_query_head,
    stride_key,
    stride_key_head,
    stride_rope,
    stride_out,
    stride_out_head,
    scale,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (head, tile of rows). `scale` has log2 e in it."""
    head = tl.program_id(0).to(tl.int64)
    # The longest tiles start first, so that none of them is left over at the end.
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    offsets = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_C)
    ropes = tl.arange(0, BLOCK_P)
    outs = tl.arange(0, BLOCK_V)
    real = (offsets < num_rows)[:, None]
    at = query + offsets.to(tl.int64)[:, None] * stride_query + head * stride_query_head
    q = tl.load(at + dims[None, :], mask=real & (dims < NOPE)[None, :], other=0.0)
    r = tl.load(at + NOPE + ropes[None, :], mask=real & (ropes < ROPE)[None, :], other=0.0)
    rows = start + offsets
    last = start + tl.minimum(first_row + BLOCK_M, num_rows) - 1
    whole = (start + first_row + 1) // TILE * TILE
    mine = projected + head * stride_key_head
    biggest = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    acc, total, biggest = _attend_tiles(
        acc, total, biggest, q, r, mine, rope_keys, rows, 0, whole, last, scale, stride_key,
        stride_rope, NOPE, ROPE, VALUE, BLOCK_C, BLOCK_P, BLOCK_V, TILE, False, STAGES,
    )  # fmt: skip
    acc, total, biggest = _attend_tiles(
        acc, total, biggest, q, r, mine, rope_keys, rows, whole, last + 1, last, scale, stride_key,
        stride_rope, NOPE, ROPE, VALUE, BLOCK_C, BLOCK_P, BLOCK_V, TILE, True, STAGES,
    )  # fmt: skip
    found = acc / tl.maximum(total, 1.0e-30)[:, None]
    at = out + offsets.to(tl.int64)[:, None] * stride_out + head * stride_out_head
    real = real & (outs < VALUE)[None, :]
    tl.store(at + outs[None, :], found.to(out.dtype.element_ty), mask=real)


def attend_projected(
    query: torch.Tensor,
    projected: torch.Tensor,
    rope_keys: torch.Tensor,
    start: int,
    scale: float,
    out: torch.Tensor | None = None,
    *,
    block_m: int = 128,
    tile: int = 64,
    warps: int = 8,
    stages: int | None = None,
) -> torch.Tensor:
    """Rows at positions [start, start + T) over S = start + T keys, each up to its own position.

    Args:
        query: [T, H, C + P], the last dimension contiguous.
        projected: [S, H, C + V], the last dimension contiguous.
        rope_keys: [S, P], P contiguous.
        out: [T, H, V], V contiguous.
    """
    num_tokens, num_heads, size = query.shape
    rope = rope_keys.shape[1]
    nope, value = size - rope, projected.shape[2] - (size - rope)
    if out is None:
        out = torch.empty((num_tokens, num_heads, value), dtype=query.dtype, device=query.device)
    assert projected.shape[0] == rope_keys.shape[0] == start + num_tokens
    assert query.stride(2) == projected.stride(2) == rope_keys.stride(1) == out.stride(2) == 1
    block_c, block_p, block_v = (max(16, triton.next_power_of_2(n)) for n in (nope, rope, value))
    if query.dtype == torch.float32:
        # float32 uses no matrix unit, and its products are held in registers.
        block_m, tile = min(block_m, 32), min(tile, 32)
    if stages is None:
        row_bytes = (block_c + block_p + block_v) * query.element_size()
        query_bytes = block_m * (block_c + block_p) * query.element_size()
        stages = min(3, max(1, (210_000 - query_bytes) // (tile * row_bytes)))
    block_m = min(block_m, max(16, triton.next_power_of_2(num_tokens)))
    warps = min(warps, max(4, block_m // 16))
    mla_extend_kernel[(num_heads, triton.cdiv(num_tokens, block_m))](
        query,
        projected,
        rope_keys,
        out,
        start,
        num_tokens,
        query.stride(0),
        query.stride(1),
        projected.stride(0),
        projected.stride(1),
        rope_keys.stride(0),
        out.stride(0),
        out.stride(1),
        scale * _LOG2E,
        NOPE=nope,
        ROPE=rope,
        VALUE=value,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        BLOCK_V=block_v,
        TILE=tile,
        STAGES=stages,
        num_warps=warps,
    )
    return out
