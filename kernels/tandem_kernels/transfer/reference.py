"""KV pages gathered and scattered in plain torch.

Legend: L layers, N blocks, K KV heads, P tokens per page, D head dimension, n blocks to move.
"""

import torch


def _slices(cache: torch.Tensor, layers: range, heads: range | None) -> torch.Tensor:
    chosen = range(cache.shape[3]) if heads is None else heads
    return cache[layers.start : layers.stop, :, :, chosen.start : chosen.stop]


def pack(
    cache: torch.Tensor, blocks: torch.Tensor, layers: range, heads: range | None = None
) -> torch.Tensor:
    """The pages of `blocks`, for some layers and heads, in one piece.

    Args:
        cache: [L, 2, N, K, P, D], or with one plane instead of K and V.
        blocks: [n] int64.
        layers, heads: contiguous ranges; None stands for all heads. A slice of heads is for peers
            with a different tensor parallelism.

    Returns:
        [L', 2, n, K', P, D], contiguous.
    """
    return _slices(cache, layers, heads).index_select(2, blocks).contiguous()


def unpack(
    packed: torch.Tensor,
    cache: torch.Tensor,
    blocks: torch.Tensor,
    layers: range,
    heads: range | None = None,
) -> None:
    """Write [L', 2, n, K', P, D] back into the pages of `blocks`."""
    _slices(cache, layers, heads)[:, :, blocks] = packed
