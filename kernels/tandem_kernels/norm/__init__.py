"""Root mean square norm: the Triton kernel for CUDA tensors, plain torch for all others."""

import torch

from tandem_kernels.norm import reference


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, weight_in_float32: bool = False
) -> torch.Tensor:
    """x / sqrt(mean(x², last dimension) + epsilon) · weight; see `reference.rms_norm`."""
    if x.is_cuda and x.stride(-1) == 1:
        from tandem_kernels.norm import kernel
        from tandem_kernels.overlap import is_supported

        return kernel.rms_norm(x, weight, epsilon, weight_in_float32, overlap=is_supported())
    return reference.rms_norm(x, weight, epsilon, weight_in_float32)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    weight_in_float32: bool = False,
) -> torch.Tensor:
    """residual += x in place, then the norm of the sum; see `reference.add_rms_norm`."""
    if x.is_cuda and x.stride(-1) == 1 and residual.is_contiguous():
        from tandem_kernels.norm import kernel
        from tandem_kernels.overlap import is_supported

        return kernel.add_rms_norm(
            x, residual, weight, epsilon, weight_in_float32, overlap=is_supported()
        )
    return reference.add_rms_norm(x, residual, weight, epsilon, weight_in_float32)


__all__ = ["add_rms_norm", "rms_norm"]
