"""Rotary position embedding in plain torch (Su et al., 2021; halves rotated, as in GPT-NeoX)."""

import torch

from tandem_kernels.attention.reference import write_kv
from tandem_kernels.norm.reference import rms_norm


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each head's pairs (i, i + D/2) by the token's angle i.

    Args:
        x: [T, H, D].
        cos, sin: [T, D/2], in x's dtype.

    Returns:
        [T, H, D].
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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
) -> torch.Tensor:
    """Norm (if weights are given) and rotate queries and keys, and write K and V to the pages.

    Args:
        qkv: [T, (H + 2 K) · D].
        cos, sin: [T, D/2].
        key_cache, value_cache: [N, K, P, D], changed in place.
        blocks, offsets: [T] int64; a negative block (padding) writes nothing.
        query_weight, key_weight: [D], both or neither.

    Returns:
        Queries [T, H, D].
    """
    _, num_kv_heads, _, head_dim = key_cache.shape
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if query_weight is not None and key_weight is not None:
        query = rms_norm(query, query_weight, epsilon, weight_in_float32)
        key = rms_norm(key, key_weight, epsilon, weight_in_float32)
    key = apply_rope(key, cos, sin)
    if int(blocks.min()) < 0:
        real = blocks >= 0
        key, value, blocks, offsets = key[real], value[real], blocks[real], offsets[real]
    key, value = key.to(key_cache.dtype), value.to(value_cache.dtype)
    write_kv(key, value, key_cache, value_cache, blocks, offsets)
    return apply_rope(query, cos, sin)
