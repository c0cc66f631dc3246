"""The sum over ranks in plain torch."""

import torch


def sum_ranks(parts: torch.Tensor) -> torch.Tensor:
    """Σ over the first dimension, rank 0 first, in float32 (float64 stays); rounded once.

    Args:
        parts: [ranks, ..., C], any float dtype.

    Returns:
        [..., C] in the same dtype.
    """
    wide = parts if parts.dtype == torch.float64 else parts.float()
    total = wide[0].clone()
    for part in wide[1:]:
        total += part
    return total.to(parts.dtype)
