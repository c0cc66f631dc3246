"""Rotary embedding, the norms of queries and keys, and the paged KV write in one launch."""

import torch
import triton
import triton.language as tl

from tandem_kernels.overlap import (
    launch_options,
    let_next_start,
    starts_next_early,
    wait_for_inputs,
)


@triton.jit
def _rotate(
    x,
    heads,
    count,
    weight,
    cos,
    sin,
    epsilon,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Both halves [heads, D/2] of a token's heads, normed and rotated, in float32."""
    dims = tl.arange(0, BLOCK_D)
    inside = (heads < count)[:, None] & (dims < D // 2)[None, :]
    at = x + heads[:, None] * D + dims[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + D // 2, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1)
        factor = tl.rsqrt(squares / D + epsilon)[:, None]
        w1 = tl.load(weight + dims, mask=dims < D // 2, other=0.0)
        w2 = tl.load(weight + D // 2 + dims, mask=dims < D // 2, other=0.0)
        first, second = first * factor, second * factor
        if not IN_FLOAT32:
            first = first.to(x.dtype.element_ty).to(tl.float32)
            second = second.to(x.dtype.element_ty).to(tl.float32)
        first = first * w1.to(tl.float32)[None, :]
        second = second * w2.to(tl.float32)[None, :]
    c = tl.load(cos + dims, mask=dims < D // 2, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + dims, mask=dims < D // 2, other=0.0).to(tl.float32)[None, :]
    return first * c - second * s, second * c + first * s


@triton.jit
def rope_write_kernel(
    qkv,
    cos,
    sin,
    query_weight,
    key_weight,
    query_out,
    key_cache,
    value_cache,
    blocks,
    offsets,
    stride_qkv,
    stride_out,
    stride_block,
    stride_head,
    epsilon,
    key_factor,
    value_factor,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NORM: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (heads' block, token): the first blocks are queries, then keys, then values."""
    let_next_start(EARLY)
    token = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    QUERY_PARTS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    KEY_PARTS: tl.constexpr = (K + BLOCK_H - 1) // BLOCK_H
    dims = tl.arange(0, BLOCK_D)
    wait_for_inputs(PDL)
    row = qkv + token * stride_qkv
    cos += token * (D // 2)
    sin += token * (D // 2)
    if part < QUERY_PARTS:
        heads = part * BLOCK_H + tl.arange(0, BLOCK_H)
        first, second = _rotate(
            row, heads, H, query_weight, cos, sin, epsilon, D, BLOCK_D, NORM, IN_FLOAT32
        )
        inside = (heads < H)[:, None] & (dims < D // 2)[None, :]
        at = query_out + token * stride_out + heads[:, None] * D + dims[None, :]
        tl.store(at, first.to(query_out.dtype.element_ty), mask=inside)
        tl.store(at + D // 2, second.to(query_out.dtype.element_ty), mask=inside)
    else:
        block = tl.load(blocks + token).to(tl.int64)
        place = tl.load(offsets + token).to(tl.int64)
        if block >= 0:
            slot = block * stride_block + place * D
            if part < QUERY_PARTS + KEY_PARTS:
                heads = (part - QUERY_PARTS) * BLOCK_H + tl.arange(0, BLOCK_H)
                first, second = _rotate(
                    row + H * D,
                    heads,
                    K,
                    key_weight,
                    cos,
                    sin,
                    epsilon,
                    D,
                    BLOCK_D,
                    NORM,
                    IN_FLOAT32,
                )
                inside = (heads < K)[:, None] & (dims < D // 2)[None, :]
                at = key_cache + slot + heads.to(tl.int64)[:, None] * stride_head + dims[None, :]
                tl.store(at, (first * key_factor).to(key_cache.dtype.element_ty), mask=inside)
                at += D // 2
                tl.store(at, (second * key_factor).to(key_cache.dtype.element_ty), mask=inside)
            else:
                heads = (part - QUERY_PARTS - KEY_PARTS) * BLOCK_H + tl.arange(0, BLOCK_H)
                inside = (heads < K)[:, None] & (dims < D // 2)[None, :]
                source = row + (H + K) * D + heads[:, None] * D + dims[None, :]
                first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
                second = tl.load(source + D // 2, mask=inside, other=0.0).to(tl.float32)
                at = value_cache + slot + heads.to(tl.int64)[:, None] * stride_head + dims[None, :]
                tl.store(at, (first * value_factor).to(value_cache.dtype.element_ty), mask=inside)
                at += D // 2
                tl.store(at, (second * value_factor).to(value_cache.dtype.element_ty), mask=inside)


def rope_and_write(
    qkv: torch.Tensor,
    num_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    weight_in_float32: bool = False,
    out: torch.Tensor | None = None,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    block_heads: int = 8,
    overlap: bool = False,
) -> torch.Tensor:
    """The reference's `rope_and_write`: returns the queries, puts keys and values into the pages.

    Args:
        qkv: [T, (H + 2 K) · D], D contiguous; with `out` = its own first part, changed in place.
        cos, sin: [T, D/2], contiguous.
        key_cache, value_cache: [N, K, P, D] of one layer; fp8 ones get values over their scale.
        blocks, offsets: [T] integers; a negative block (padding) writes nothing.
        out: [T, H, D], heads contiguous.
    """
    num_tokens = qkv.shape[0]
    _, num_kv_heads, _, head_dim = key_cache.shape
    if out is None:
        shape = (num_tokens, num_heads, head_dim)
        out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    assert key_cache.stride() == value_cache.stride()
    assert key_cache.stride(2) == head_dim
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    block_h = min(block_heads, triton.next_power_of_2(num_heads))
    parts = triton.cdiv(num_heads, block_h) + 2 * triton.cdiv(num_kv_heads, block_h)
    norm = query_weight is not None
    elements = block_h * triton.next_power_of_2(head_dim)
    for at in range(0, num_tokens, 65_535):
        some = slice(at, at + 65_535)
        rope_write_kernel[(parts, qkv[some].shape[0])](
            qkv[some],
            cos[some],
            sin[some],
            query_weight if norm else qkv,
            key_weight if norm else qkv,
            out[some],
            key_cache,
            value_cache,
            blocks[some],
            offsets[some],
            qkv.stride(0),
            out.stride(0),
            key_cache.stride(0),
            key_cache.stride(1),
            epsilon,
            1.0 / key_scale,
            1.0 / value_scale,
            H=num_heads,
            K=num_kv_heads,
            D=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim // 2),
            BLOCK_H=block_h,
            NORM=norm,
            IN_FLOAT32=weight_in_float32,
            num_warps=min(max(elements // 512, 1), 8),
            PDL=overlap,
            EARLY=overlap and starts_next_early(num_tokens),
            **launch_options(overlap),
        )
    return out
