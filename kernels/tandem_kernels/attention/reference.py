"""Attention over paged KV in plain torch.

Legend: T tokens, B sequences, H query heads, K KV heads, G = H / K, D head dimension, N blocks of
the cache, P tokens per page, M block table entries, S = M · P key positions.
"""

import torch
from torch.nn import functional

_QUERY_TILE = 512


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Write each token's key and value at (block, offset in its page).

    Args:
        key, value: [T, K, D].
        key_cache, value_cache: [N, K, P, D], changed in place.
        blocks, offsets: [T] int64.
    """
    key_cache[blocks, :, offsets] = key
    value_cache[blocks, :, offsets] = value


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """One query token per sequence against the pages of its block table.

    Args:
        query: [B, H, D].
        key_cache, value_cache: [N, K, P, D].
        block_tables: [B, M] int64; padding may name any block.
        mask: [B, S] bool, True where a key may be seen.

    Returns:
        [B, H, D].
    """
    batch, num_heads, head_dim = query.shape
    num_kv_heads = key_cache.shape[1]
    keys = _gather(key_cache, block_tables)  # [B, K, S, D]
    values = _gather(value_cache, block_tables)
    # The query heads that share a KV head become the rows of one product.
    grouped = query.view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)  # [B, K, G, D]
    found = _attend(grouped, keys, values, mask[:, None, None, :], scale, softcap)
    return found.reshape(batch, num_heads, head_dim)


def _gather(cache: torch.Tensor, block_tables: torch.Tensor) -> torch.Tensor:
    """The pages that the tables name: [B, K, S, D]."""
    batch, width = block_tables.shape
    _, num_kv_heads, page, head_dim = cache.shape
    pages = cache.index_select(0, block_tables.reshape(-1))  # [B·M, K, P, D]
    pages = pages.view(batch, width, num_kv_heads, page, head_dim).transpose(1, 2)
    return pages.reshape(batch, num_kv_heads, width * page, head_dim)


def extend_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    start: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """A chunk of one sequence, at positions [start, start + T), against all that came before.

    The chunk's own keys and values are already in the pages. Position p sees the positions
    (p - window, p], or [0, p] without a window.

    Args:
        query: [T, H, D].
        key_cache, value_cache: [N, K, P, D].
        block_table: [M] int64, the sequence's blocks from its first position on.

    Returns:
        [T, H, D].
    """
    num_tokens = query.shape[0]
    page = key_cache.shape[2]
    oldest = 0 if window is None else max(0, start - window + 1)
    first_block, base = oldest // page, oldest // page * page
    table = block_table[first_block : (start + num_tokens - 1) // page + 1]
    keys = _gather(key_cache, table[None])  # [1, K, S, D], position of the first: base
    values = _gather(value_cache, table[None])
    tile = num_tokens if window is None else _QUERY_TILE
    found = [
        _extend_tile(query[at : at + tile], keys, values, start + at, base, scale, window, softcap)
        for at in range(0, num_tokens, tile)
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


def _extend_tile(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    base: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Rows [start, start + T) against the keys that they may see; keys[0] is at position `base`."""
    end = start + query.shape[0]
    oldest = base if window is None else max(base, start - window + 1)
    keys = keys[:, :, oldest - base : end - base]
    values = values[:, :, oldest - base : end - base]
    rows = query.transpose(0, 1)[None]  # [1, H, T, D]
    group = query.shape[1] // keys.shape[1]
    if group > 1:
        keys = keys.repeat_interleave(group, dim=1)
        values = values.repeat_interleave(group, dim=1)
    reaches_all = window is None or end - oldest <= window
    if oldest == start and reaches_all and softcap is None:
        found = functional.scaled_dot_product_attention(
            rows, keys, values, is_causal=True, scale=scale
        )
        return found[0].transpose(0, 1)
    positions = torch.arange(start, end, device=query.device)[:, None]
    seen = torch.arange(oldest, end, device=query.device)[None, :]
    mask = seen <= positions
    if not reaches_all and window is not None:
        mask &= seen > positions - window
    return _attend(rows, keys, values, mask, scale, softcap)[0].transpose(0, 1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Softmax attention with a bool mask; softcap makes scores softcap · tanh(score / softcap)."""
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale
        )
    scores = query @ keys.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ values
