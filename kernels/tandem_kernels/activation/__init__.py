"""Gated activations of the MLP."""

from tandem_kernels.activation.reference import gelu_tanh_and_multiply, silu_and_multiply

__all__ = ["gelu_tanh_and_multiply", "silu_and_multiply"]
