"""Gated activations in plain torch (Shazeer, 2020): the left half gates the right one."""

import torch
from torch.nn import functional


def silu_and_multiply(x: torch.Tensor) -> torch.Tensor:
    """silu(x[..., :I]) · x[..., I:] for x of [..., 2 I]."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gelu_tanh_and_multiply(x: torch.Tensor) -> torch.Tensor:
    """gelu(x[..., :I], tanh form) · x[..., I:] for x of [..., 2 I]."""
    gate, up = x.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up
