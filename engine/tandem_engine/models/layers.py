"""The pieces that decoder layers are made of. They own no tensors: parameters are lent by name."""

from collections.abc import Mapping

import torch

from tandem_engine.models.spec import ModelSpec
from tandem_kernels.linear import gated_linear, linear
from tandem_kernels.norm import add_rms_norm, rms_norm

Parameters = Mapping[str, torch.Tensor]


class Linear:
    """x Wᵀ + b."""

    def __init__(self, parameters: Parameters, name: str) -> None:
        self.weight = parameters[f"{name}.weight"]  # [out, in]
        self.bias = parameters.get(f"{name}.bias")  # [out]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class Norm:
    """RMS norm."""

    def __init__(self, spec: ModelSpec, parameters: Parameters, name: str) -> None:
        self.weight = parameters[f"{name}.weight"]
        self.epsilon = spec.norm_epsilon
        self.in_float32 = spec.norm_in_float32

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.epsilon, self.in_float32)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual += x in place; the norm of the sum."""
        return add_rms_norm(x, residual, self.weight, self.epsilon, self.in_float32)


class GatedMlp:
    """act(x Gᵀ) · (x Uᵀ), and down again."""

    def __init__(self, spec: ModelSpec, parameters: Parameters, prefix: str) -> None:
        self.gate_up = Linear(parameters, f"{prefix}.gate_up")
        self.down = Linear(parameters, f"{prefix}.down")
        self.gelu = spec.activation == "gelu_tanh"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(gated_linear(x, self.gate_up.weight, self.gelu, self.gate_up.bias))
