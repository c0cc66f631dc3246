"""Multi-head latent attention (DeepSeek-V2, 2024) over paged latents, in plain torch.

For each token a page holds a latent of R numbers, of which every head's keys and values are linear
functions, and P numbers of a rotated key that all heads share: W = R + P. Decoding works on the
latents themselves, with the key projection absorbed into the query and the value projection left to
the caller; prompts project the latents up.

Legend: T tokens, B sequences, H query heads, R latent rank, P rotated dimensions, W = R + P,
C head dimensions without position, V value dimensions, N blocks of the cache, G tokens per page,
M block table entries, S = M · G key positions.
"""

import torch
from torch.nn import functional

from tandem_kernels.norm.reference import rms_norm


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate pairs by angle i: (2i, 2i + 1) if interleaved, else (i, i + P/2), each in its place.

    Args:
        x: [T, ..., P].
        cos, sin: [T, P/2].
    """
    shape = (x.shape[0], *[1] * (x.dim() - 2), -1)
    cos, sin = cos.view(shape), sin.view(shape)
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)


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
) -> torch.Tensor:
    """Norm each token's latent, rotate its shared key, write both to the pages; rotate the queries.

    Args:
        latents: [T, W], as projected: R numbers of the latent, then P of the shared key.
        query: [T, H, P], the part of the queries that is rotated.
        weight: [R] of the latent's RMS norm.
        cos, sin: [T, P/2].
        cache: [N, 1, G, W], changed in place.
        blocks, offsets: [T] integers; a negative block (padding) writes nothing.

    Returns:
        The rotated queries [T, H, P].
    """
    rank = weight.shape[0]
    latent = rms_norm(latents[:, :rank], weight, epsilon)
    key = rotate(latents[:, rank:], cos, sin, interleaved)
    real = blocks >= 0
    cache[blocks[real], 0, offsets[real]] = torch.cat((latent, key), -1)[real].to(cache.dtype)
    return rotate(query, cos, sin, interleaved)


def gather(cache: torch.Tensor, block_tables: torch.Tensor) -> torch.Tensor:
    """Pages [N, 1, G, W] by tables [B, M]: [B, S, W]."""
    batch, width = block_tables.shape
    pages = cache.index_select(0, block_tables.reshape(-1).long())
    return pages.view(batch, width * cache.shape[2], cache.shape[3])


def decode_attention(
    latent_query: torch.Tensor,
    rope_query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One query token per sequence over its latents, which are the values as well.

    Args:
        latent_query: [B, H, R], the query times the head's key projection.
        rope_query: [B, H, P], rotated.
        cache: [N, 1, G, W].
        block_tables: [B, M]; padding may name any block.
        lengths: [B], the existing positions, including the step's own; 0 gives zeros.

    Returns:
        [B, H, R]: the attended latent of each head.
    """
    rank = latent_query.shape[2]
    latents = gather(cache, block_tables)  # [B, S, W]
    seen = torch.arange(latents.shape[1], device=latents.device) < lengths[:, None]  # [B, S]
    latents = latents.masked_fill(~seen[..., None], 0.0)
    query = torch.cat((latent_query, rope_query), dim=-1)  # [B, H, W]
    scores = (query @ latents.transpose(1, 2)).float() * scale
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    weights = weights.masked_fill((lengths == 0)[:, None, None], 0.0).to(query.dtype)
    return weights @ latents[..., :rank]


def extend_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    start: int,
    up_projection: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """A chunk of one sequence at positions [start, start + T) against all that came before.

    The chunk's own latents are already in the pages.

    Args:
        query: [T, H, C + P], rotated.
        cache: [N, 1, G, W].
        block_table: [M], the sequence's blocks from its first position on.
        up_projection: [H · (C + V), R]: for each head the rows of its keys, then of its values.

    Returns:
        [T, H, V].
    """
    num_tokens, num_heads, size = query.shape
    end, rank = start + num_tokens, up_projection.shape[1]
    rope = cache.shape[3] - rank
    table = block_table[: -(-end // cache.shape[2])]
    latents = gather(cache, table[None])[0, :end]  # [S, W]
    expanded = functional.linear(latents[:, :rank], up_projection)
    expanded = expanded.view(end, num_heads, -1)  # [S, H, C + V]
    shared = latents[:, None, rank:].expand(-1, num_heads, -1)
    keys = torch.cat((expanded[..., : size - rope], shared), dim=-1)  # [S, H, C + P]
    values = expanded[..., size - rope :]
    rows, keys, values = (x.transpose(0, 1)[None] for x in (query, keys, values))
    if start == 0:
        found = functional.scaled_dot_product_attention(
            rows, keys, values, is_causal=True, scale=scale
        )
    else:
        places = torch.arange(end, device=query.device)
        mask = places <= places[start:, None]
        found = functional.scaled_dot_product_attention(
            rows, keys, values, attn_mask=mask, scale=scale
        )
    return found[0].transpose(0, 1)
