"""Around cuDNN's attention: pages into rows, and two partial results into one."""

import torch
import triton
import triton.language as tl


@triton.jit
def gather_pages_kernel(
    key_cache,
    value_cache,
    table,
    keys,
    values,
    stride_block,
    stride_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (page, head, K or V): one head's part of a page."""
    page, head = tl.program_id(0), tl.program_id(1)
    places, dims = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    inside = (places < PAGE)[:, None] & (dims < HEAD_DIM)[None, :]
    block = tl.load(table + page).to(tl.int64)
    source = block * stride_block + head * stride_head
    source += places[:, None] * HEAD_DIM + dims[None, :]
    row = page.to(tl.int64) * PAGE + places
    target = (row[:, None] * NUM_HEADS + head) * HEAD_DIM + dims[None, :]
    if tl.program_id(2) == 0:
        tl.store(keys + target, tl.load(key_cache + source, mask=inside), mask=inside)
    else:
        tl.store(values + target, tl.load(value_cache + source, mask=inside), mask=inside)


def gather_pages(
    key_cache: torch.Tensor, value_cache: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [M · P, K, D] of the pages that `table` [M] names, from [N, K, P, D]."""
    _, num_heads, page, head_dim = key_cache.shape
    shape = (table.shape[0] * page, num_heads, head_dim)
    keys = torch.empty(shape, dtype=key_cache.dtype, device=key_cache.device)
    values = torch.empty_like(keys)
    assert key_cache.stride() == value_cache.stride()
    assert key_cache.stride(2) == head_dim
    gather_pages_kernel[(table.shape[0], num_heads, 2)](
        key_cache,
        value_cache,
        table,
        keys,
        values,
        key_cache.stride(0),
        key_cache.stride(1),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        PAGE=page,
        BLOCK_P=triton.next_power_of_2(page),
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
    return keys, values


@triton.jit(do_not_specialize=["num_tokens"])
def merge_parts_kernel(
    first,
    first_lse,
    second,
    second_lse,
    out,
    num_tokens,
    stride_row,
    stride_head,
    stride_out,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (token, heads' block)."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    real = heads < NUM_HEADS
    inside = real[:, None] & (dims < HEAD_DIM)[None, :]
    lse = heads.to(tl.int64) * num_tokens + token
    a = tl.load(first_lse + lse, mask=real, other=0.0)
    b = tl.load(second_lse + lse, mask=real, other=0.0)
    share = 1.0 / (1.0 + tl.exp(a - b))  # of the second
    at = token * stride_row + heads[:, None] * stride_head + dims[None, :]
    x = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    found = x + (y - x) * share[:, None]
    place = out + token * stride_out + heads[:, None] * HEAD_DIM + dims[None, :]
    tl.store(place, found.to(out.dtype.element_ty), mask=inside)


def merge_parts(
    first: torch.Tensor,
    first_lse: torch.Tensor,
    second: torch.Tensor,
    second_lse: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Attention over two sets of keys from the attention over each (Dao et al., 2023).

    Args:
        first, second: [T, H, D] of equal strides, D contiguous.
        first_lse, second_lse: [H, T] float32, natural base, contiguous.
        out: [T, H, D], heads contiguous.
    """
    num_tokens, num_heads, head_dim = first.shape
    assert first.stride() == second.stride()
    assert first_lse.is_contiguous()
    assert second_lse.is_contiguous()
    block_h = min(16, triton.next_power_of_2(num_heads))
    merge_parts_kernel[(num_tokens, triton.cdiv(num_heads, block_h))](
        first,
        first_lse,
        second,
        second_lse,
        out,
        num_tokens,
        first.stride(0),
        first.stride(1),
        out.stride(0),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_H=block_h,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
    return out
