"""Attention over paged KV.

The reference ops run on any device. For CUDA tensors `extend_attention` uses the Gluon kernel where
it applies (on Hopper), and the paged Triton kernel elsewhere. Decoding on CUDA goes through
`decode_kernel.paged_decode`, whose plan outlives a step.
"""

import torch

from tandem_kernels.attention import reference
from tandem_kernels.attention.reference import decode_attention


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
    """Attention of one sequence's chunk at [start, start + T) over everything up to each row.

    `reference.extend_attention` describes the arguments and the result.
    """
    if not query.is_cuda:
        return reference.extend_attention(
            query, key_cache, value_cache, block_table, start, scale, window, softcap
        )
    from tandem_kernels.attention import hopper_extend
    from tandem_kernels.attention.extend_kernel import paged_extend

    def numbers(*values: int) -> torch.Tensor:
        # Pinned: otherwise the copy would wait for all the work in the stream.
        pinned = torch.tensor(values, dtype=torch.int32).pin_memory()
        return pinned.to(query.device, non_blocking=True)

    length, tables = query.shape[0], block_table.int()[None]
    if length >= hopper_extend.FEWEST_ROWS and hopper_extend.suits(key_cache, softcap):
        pages = hopper_extend.describe_pages(key_cache, value_cache)
        tiles = numbers(*hopper_extend.plan_tiles([(start, length)]))
        return hopper_extend.extend_from_pages(
            query, pages, tables, tiles, key_cache.shape[1], scale, window
        )
    chunk = (tables, numbers(start), numbers(0, length), length)
    return paged_extend(query, key_cache, value_cache, *chunk, scale, window, softcap)


__all__ = ["decode_attention", "extend_attention"]
