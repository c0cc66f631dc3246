"""The latent's norm, the rotation of the shared key and of the queries, and the paged write."""

import torch
import triton
import triton.language as tl

from tandem_kernels.overlap import launch_options, wait_for_inputs

SMALLEST_PROMPT = 1024
"""From this many tokens on, they fill the device without cutting each one into parts."""


@triton.jit
def _rotate(x, c, s, ROWS: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """[ROWS, ROPE] with its pairs rotated, in float32; places are kept. c, s: [1, ROPE/2]."""
    wide = x.to(tl.float32)
    if INTERLEAVED:
        first, second = tl.split(tl.reshape(wide, [ROWS, ROPE // 2, 2]))
    else:
        halves = tl.permute(tl.reshape(wide, [ROWS, 2, ROPE // 2]), [0, 2, 1])
        first, second = tl.split(halves)
    pair = tl.join(first * c - second * s, second * c + first * s)
    if not INTERLEAVED:
        pair = tl.permute(pair, [0, 2, 1])
    return tl.reshape(pair, [ROWS, ROPE])


@triton.jit
def _rotate_queries(
    query, query_out, token, number, c, s, stride_query, stride_query_head,
    NUM_HEADS: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One block of a token's heads."""
    ropes = tl.arange(0, ROPE)
    heads = number * BLOCK_H + tl.arange(0, BLOCK_H)
    real = (heads < NUM_HEADS)[:, None]
    at = query + token * stride_query + heads[:, None] * stride_query_head + ropes[None, :]
    turned = _rotate(tl.load(at, mask=real, other=0.0), c, s, BLOCK_H, ROPE, INTERLEAVED)
    at = query_out + (token * NUM_HEADS + heads[:, None]) * ROPE + ropes[None, :]
    tl.store(at, turned.to(query_out.dtype.element_ty), mask=real)


@triton.jit
def mla_write_kernel(
    latents,
    query,
    weight,
    cos,
    sin,
    query_out,
    cache,
    blocks,
    offsets,
    stride_latents,
    stride_query,
    stride_query_head,
    stride_block,
    epsilon,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, part): part 0 writes the latent and the key, the others rotate queries.

    With BLOCKS > 0 there is one part, which does all of it.
    """
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    angles = tl.arange(0, ROPE // 2)
    ropes = tl.arange(0, ROPE)
    wait_for_inputs(PDL)
    c = tl.load(cos + token * (ROPE // 2) + angles).to(tl.float32)[None, :]
    s = tl.load(sin + token * (ROPE // 2) + angles).to(tl.float32)[None, :]
    if part == 0:
        block = tl.load(blocks + token).to(tl.int64)
        place = tl.load(offsets + token).to(tl.int64)
        if block >= 0:
            row = latents + token * stride_latents
            slot = cache + block * stride_block + place * (RANK + ROPE)
            ranks = tl.arange(0, BLOCK_R)
            inside = ranks < RANK
            x = tl.load(row + ranks, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weight + ranks, mask=inside, other=0.0)
            normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / RANK + epsilon)
            found = normed.to(latents.dtype.element_ty) * w
            tl.store(slot + ranks, found.to(cache.dtype.element_ty), mask=inside)
            key = tl.load(row + RANK + ropes)[None, :]
            turned = _rotate(key, c, s, 1, ROPE, INTERLEAVED)
            at = slot + RANK + ropes[None, :]
            tl.store(at, turned.to(cache.dtype.element_ty))
    if BLOCKS > 0:
        for number in tl.static_range(BLOCKS):
            _rotate_queries(
                query, query_out, token, number, c, s, stride_query, stride_query_head,
                NUM_HEADS, ROPE, BLOCK_H, INTERLEAVED,
            )  # fmt: skip
    elif part > 0:
        _rotate_queries(
            query, query_out, token, part - 1, c, s, stride_query, stride_query_head,
            NUM_HEADS, ROPE, BLOCK_H, INTERLEAVED,
        )  # fmt: skip


def rope_and_write(
    latents: torch.Tensor,
    query: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
    epsilon: float,
    interleaved: bool = True,
    out: torch.Tensor | None = None,
    *,
    block_heads: int | None = None,
    whole: bool | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """Norm and write latents, rotate and write keys, and rotate queries, in one launch.

    It computes what `reference.rope_and_write` does.

    Args:
        latents: [T, R + P]; rows may be strided (a view of a fused projection).
        query: [T, H, P], P contiguous and a power of two; tokens and heads may be strided.
        cos, sin: [T, P/2], contiguous.
        cache: [N, 1, G, R + P] of one layer, its pages contiguous.
        blocks, offsets: [T] integers; a negative block (padding) writes nothing.
        out: [T, H, P], contiguous.
        whole: one program per token instead of one per block of its heads (None: for prompts).
    """
    num_tokens, num_heads, rope = query.shape
    rank = weight.shape[0]
    if out is None:
        out = torch.empty((num_tokens, num_heads, rope), dtype=query.dtype, device=query.device)
    assert rope == triton.next_power_of_2(rope)
    assert latents.shape[1] == cache.shape[3] == cache.stride(2) == rank + rope
    assert latents.stride(1) == query.stride(2) == 1
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert out.is_contiguous()
    if whole is None:
        whole = num_tokens >= SMALLEST_PROMPT
    most = block_heads or (128 if whole else 32)
    block_h = min(most, triton.next_power_of_2(num_heads))
    blocks_of_heads = triton.cdiv(num_heads, block_h)
    mla_write_kernel[(num_tokens, 1 if whole else 1 + blocks_of_heads)](
        latents,
        query,
        weight,
        cos,
        sin,
        out,
        cache,
        blocks,
        offsets,
        latents.stride(0),
        query.stride(0),
        query.stride(1),
        cache.stride(0),
        epsilon,
        NUM_HEADS=num_heads,
        RANK=rank,
        ROPE=rope,
        BLOCK_R=triton.next_power_of_2(rank),
        BLOCK_H=block_h,
        INTERLEAVED=interleaved,
        BLOCKS=blocks_of_heads if whole else 0,
        PDL=overlap,
        num_warps=2,
        **launch_options(overlap),
    )
    return out
