"""The pieces of a decoder layer. They own no parameters: those are lent to them by name."""

from collections.abc import Mapping

import torch
from torch.nn import functional

from tandem_engine.models.collective import Collective
from tandem_engine.spec.model import ModelSpec
from tandem_kernels.linear import gated_linear, linear
from tandem_kernels.norm import rms_norm
from tandem_kernels.peer_sum import AddNorm

Parameters = Mapping[str, torch.Tensor]


class Linear:
    """x Wᵀ + b."""

    def __init__(self, parameters: Parameters, name: str) -> None:
        self.weight = parameters[f"{name}.weight"]  # [out, in]
        self.bias = parameters.get(f"{name}.bias")  # [out]

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x, self.weight, self.bias, out)


class PartialLinear:
    """A rank's part of x Wᵀ + b, from its columns of W and x. The caller adds up all ranks' parts.

    The first rank's part includes the bias.
    """

    def __init__(self, parameters: Parameters, name: str, collective: Collective) -> None:
        self.weight = parameters[f"{name}.weight"]  # [out, in / ranks]
        bias = parameters.get(f"{name}.bias")  # [out]
        self.bias = bias if collective.is_first else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class Embedding:
    """Rows of the vocabulary, which is divided among the ranks."""

    def __init__(self, weight: torch.Tensor, collective: Collective) -> None:
        self.weight = weight  # [V / ranks, C]
        self.collective = collective
        self.start = collective.shard.rank * weight.shape[0]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """[T] → [T, C]."""
        if self.collective.is_alone:
            return functional.embedding(ids, self.weight)
        places = ids - self.start
        missing = (places < 0) | (places >= self.weight.shape[0])
        own = functional.embedding(places.masked_fill_(missing, 0), self.weight)
        return self.collective.add(own.masked_fill_(missing[:, None], 0))


class Norm:
    """RMS norm."""

    def __init__(self, spec: ModelSpec, parameters: Parameters, name: str) -> None:
        self.weight = parameters[f"{name}.weight"]
        self.epsilon = spec.norm_epsilon
        self.in_float32 = spec.norm_in_float32

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.epsilon, self.in_float32)

    def add(self, x: torch.Tensor, residual: torch.Tensor, collective: Collective) -> torch.Tensor:
        """residual += x summed over all ranks; returns its norm in x's dtype. Overwrites x."""
        norm = AddNorm(residual, self.weight, self.epsilon, self.in_float32)
        return collective.add_norm(x, norm)


class GatedMlp:
    """A rank's part of (act(x Gᵀ) · (x Uᵀ)) Dᵀ: gate, up and down."""

    def __init__(
        self, spec: ModelSpec, parameters: Parameters, prefix: str, collective: Collective
    ) -> None:
        self.gate_up = Linear(parameters, f"{prefix}.gate_up")
        self.down = PartialLinear(parameters, f"{prefix}.down", collective)
        self.gelu = spec.activation == "gelu_tanh"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(gated_linear(x, self.gate_up.weight, self.gelu, self.gate_up.bias))
