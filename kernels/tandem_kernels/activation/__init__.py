"""Gated activations: the Triton kernel for CUDA tensors, plain torch for all others."""

import torch

from tandem_kernels.activation import reference


def silu_and_multiply(x: torch.Tensor) -> torch.Tensor:
    """silu(x[..., :I]) · x[..., I:] for x of [..., 2 I]."""
    if x.is_cuda:
        from tandem_kernels.activation import kernel

        return kernel.silu_and_multiply(x)
    return reference.silu_and_multiply(x)


def gelu_tanh_and_multiply(x: torch.Tensor) -> torch.Tensor:
    """gelu(x[..., :I], tanh form) · x[..., I:] for x of [..., 2 I]."""
    if x.is_cuda:
        from tandem_kernels.activation import kernel

        return kernel.gelu_tanh_and_multiply(x)
    return reference.gelu_tanh_and_multiply(x)


__all__ = ["gelu_tanh_and_multiply", "silu_and_multiply"]
