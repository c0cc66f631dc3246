"""RMS norm in plain torch (Zhang and Sennrich, 2019)."""

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, weight_in_float32: bool = False
) -> torch.Tensor:
    """x / sqrt(mean(x², last dimension) + epsilon) · weight, computed in float32.

    Args:
        x: [..., D], any float dtype.
        weight: [D].
        weight_in_float32: apply the weight before rounding to x's dtype (Gemma) instead of after
            (Llama); in float32 it makes no difference.

    Returns:
        [..., D] in x's dtype.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if weight_in_float32:
        return (wide * weight.float()).to(x.dtype)
    return wide.to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    weight_in_float32: bool = False,
) -> torch.Tensor:
    """residual += x in place, then the norm of the sum. All [..., D]; the result in x's dtype.

    The residual may be float32 whatever x's dtype; without `weight_in_float32` it has x's dtype.
    """
    residual += x
    return rms_norm(residual, weight, epsilon, weight_in_float32).to(x.dtype)
