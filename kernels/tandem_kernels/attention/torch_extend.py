"""Prefill attention by cuDNN over gathered pages: on Hopper the fastest for long chunks.

cuDNN's causal mask starts at the first key, so a cached prefix is attended in a call of its own,
without a mask, and the two results are merged by their log-sum-exps (Dao et al., 2023).
"""

import torch

from tandem_kernels.attention.pages_kernel import gather_pages, merge_parts

SMALLEST_CHUNK = 2048
"""Below this the paged kernel is faster, for it needs no gathered copy."""

SMALLEST_CHUNK_AFTER_PREFIX = 4096
"""With a cached prefix the merge has to pay off too."""


def suits(
    num_tokens: int,
    key_cache: torch.Tensor,
    start: int,
    window: int | None,
    softcap: float | None,
) -> bool:
    """Whether `extend_with_cudnn` can do a chunk of `num_tokens` and is worth it."""
    return (
        key_cache.is_cuda
        and window is None
        and softcap is None
        and num_tokens >= (SMALLEST_CHUNK_AFTER_PREFIX if start else SMALLEST_CHUNK)
        and key_cache.shape[3] in (64, 128)
        and key_cache.dtype in (torch.bfloat16, torch.float16)
    )


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [1, H, T, D] and log-sum-exp [1, H, T] (natural base)."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return found[0], found[1].reshape(query.shape[:3])


def extend_with_cudnn(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    start: int,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.extend_attention`, for what `suits`; into `out` [T, H, D] where given."""
    total, page = start + query.shape[0], key_cache.shape[2]
    keys, values = gather_pages(key_cache, value_cache, block_table[: -(-total // page)])
    key, value = (rows[None, :total].transpose(1, 2) for rows in (keys, values))  # [1, K, S, D]
    rows = query.transpose(0, 1)[None]
    own, own_lse = _attend(rows, key[:, :, start:], value[:, :, start:], True, scale)
    if start == 0:
        found = own[0].transpose(0, 1)
        return found if out is None else out.copy_(found)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    before, before_lse = _attend(rows, key[:, :, :start], value[:, :, :start], False, scale)
    parts = (before[0].transpose(0, 1), before_lse[0], own[0].transpose(0, 1), own_lse[0])
    return merge_parts(*parts, out)
