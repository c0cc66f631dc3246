"""KV pages gathered into one piece for a transfer, and scattered back."""

import torch

from tandem_kernels.transfer import reference


def pack(
    cache: torch.Tensor, blocks: torch.Tensor, layers: range, heads: range | None = None
) -> torch.Tensor:
    """The pages of `blocks` in one piece [L', 2, n, K', P, D], as `reference.pack` describes it."""
    if cache.is_cuda:
        from tandem_kernels.transfer import kernel

        return kernel.pack(cache, blocks, layers, heads)
    return reference.pack(cache, blocks, layers, heads)


def unpack(
    packed: torch.Tensor,
    cache: torch.Tensor,
    blocks: torch.Tensor,
    layers: range,
    heads: range | None = None,
) -> None:
    """Write packed pages [L', 2, n, K', P, D] into the pages of `blocks` in `cache`."""
    if cache.is_cuda:
        from tandem_kernels.transfer import kernel

        return kernel.unpack(packed, cache, blocks, layers, heads)
    return reference.unpack(packed, cache, blocks, layers, heads)


__all__ = ["pack", "unpack"]
