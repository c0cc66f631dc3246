"""Multi-head latent attention over paged latents.

The reference ops run on any device. For CUDA tensors, decoding goes through
`decode_kernel.paged_mla_decode`, whose plan outlives a step.
"""

import torch

from tandem_kernels.mla import reference
from tandem_kernels.mla.reference import decode_attention, rotate

_PROJECTED_ELEMENTS = 1 << 26
"""The most elements of projected keys and values that exist at once: those of one head group."""


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
    """Write normed latents and rotated keys into the pages; returns rotated queries [T, H, P].

    `reference.rope_and_write` describes the arguments.
    """
    tensors = (latents, query, weight, cos, sin, cache, blocks, offsets)
    if query.is_cuda:
        from tandem_kernels.mla import write_kernel

        return write_kernel.rope_and_write(*tensors, epsilon, interleaved)
    return reference.rope_and_write(*tensors, epsilon, interleaved)


def extend_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    start: int,
    up_projection: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one sequence's chunk at [start, start + T) over everything up to each row.

    `reference.extend_attention` describes the arguments and the result.
    """
    if not query.is_cuda:
        return reference.extend_attention(query, cache, block_table, start, up_projection, scale)
    from tandem_kernels.mla.extend_kernel import attend_projected

    num_tokens, num_heads, size = query.shape
    end, rank = start + num_tokens, up_projection.shape[1]
    table = block_table[: -(-end // cache.shape[2])]
    latents = reference.gather(cache, table[None])[0, :end]  # [S, W]
    weights = up_projection.view(num_heads, -1, rank)  # [H, C + V, R]
    value = weights.shape[1] - (size - (cache.shape[3] - rank))
    out = torch.empty((num_tokens, num_heads, value), dtype=query.dtype, device=query.device)
    group = max(1, _PROJECTED_ELEMENTS // (end * weights.shape[1]))
    for first in range(0, num_heads, group):
        heads = slice(first, first + group)
        projected = latents[:, :rank] @ weights[heads].flatten(0, 1).T
        attend_projected(
            query[:, heads],
            projected.view(end, -1, weights.shape[1]),
            latents[:, rank:],
            start,
            scale,
            out[:, heads],
        )
    return out


__all__ = ["decode_attention", "extend_attention", "rope_and_write", "rotate"]
