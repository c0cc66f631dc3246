"""Rotary position embedding in plain torch (Su et al., 2021; halves rotated, as in GPT-NeoX)."""

import torch


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
