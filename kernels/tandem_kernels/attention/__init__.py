"""Attention over paged KV.

The reference ops take any device. For CUDA tensors `extend_attention` picks between cuDNN and the
paged Triton kernel by what was measured; decoding there goes through `decode_kernel.paged_decode`,
whose plan outlives a step.
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
    """A chunk of one sequence at [start, start + T) against all before it; see the reference."""
    if not query.is_cuda:
        return reference.extend_attention(
            query, key_cache, value_cache, block_table, start, scale, window, softcap
        )
    from tandem_kernels.attention import torch_extend

    if torch_extend.suits(query.shape[0], key_cache, start, window, softcap):
        return torch_extend.extend_with_cudnn(
            query, key_cache, value_cache, block_table, start, scale
        )
    from tandem_kernels.attention.extend_kernel import paged_extend

    def numbers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=query.device)

    length = query.shape[0]
    tables = block_table.int()[None]
    chunk = (tables, numbers(start), numbers(0, length), length)
    return paged_extend(query, key_cache, value_cache, *chunk, scale, window, softcap)


__all__ = ["decode_attention", "extend_attention"]
