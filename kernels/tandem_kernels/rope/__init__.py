"""Rotary position embedding, alone and with the paged KV write."""

import torch

from tandem_kernels.rope import reference
from tandem_kernels.rope.reference import apply_rope


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
    """Norm and rotate queries and keys, and write K and V to the pages; returns the queries.

    `reference.rope_and_write` describes the arguments. On CUDA the result is a view of `qkv`, which
    is changed in place.
    """
    weights = (query_weight, key_weight, epsilon, weight_in_float32)
    tensors = (cos, sin, key_cache, value_cache, blocks, offsets)
    if qkv.is_cuda:
        from tandem_kernels.overlap import is_supported
        from tandem_kernels.rope import kernel

        # The queries stay in place, in the fused projection's output.
        query = qkv[:, : num_heads * key_cache.shape[3]].unflatten(1, (num_heads, -1))
        return kernel.rope_and_write(
            qkv, num_heads, *tensors, *weights, out=query, overlap=is_supported()
        )
    return reference.rope_and_write(qkv, num_heads, *tensors, *weights)


__all__ = ["apply_rope", "rope_and_write"]
