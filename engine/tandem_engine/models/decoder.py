"""The decoder that all families share; what differs comes from `ModelSpec`.

Legend: T tokens of the step (all sequences, flat), R rows of it whose logits are wanted, C hidden
size, H query heads, K KV heads, D head dimension, I intermediate size, V vocabulary.
"""

from collections.abc import Mapping

import torch
from torch.nn import functional

from tandem_engine.attention.backend import AttentionBackend, StepTensors
from tandem_engine.models.rope import RotaryAngles
from tandem_engine.models.spec import ModelSpec
from tandem_kernels.activation import gelu_tanh_and_multiply, silu_and_multiply
from tandem_kernels.linear import linear
from tandem_kernels.norm import rms_norm
from tandem_kernels.rope import apply_rope

Angles = tuple[torch.Tensor, torch.Tensor]


class _Linear:
    """x Wᵀ + b."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], name: str) -> None:
        self.weight = parameters[f"{name}.weight"]  # [out, in]
        self.bias = parameters.get(f"{name}.bias")  # [out]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class _Norm:
    """RMS norm; absent ones (`name` not among the parameters) leave x as it is."""

    def __init__(self, spec: ModelSpec, parameters: Mapping[str, torch.Tensor], name: str) -> None:
        self.weight = parameters.get(f"{name}.weight")
        self.epsilon = spec.norm_epsilon
        self.in_float32 = spec.norm_in_float32

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is None:
            return x
        return rms_norm(x, self.weight, self.epsilon, self.in_float32)


class DecoderLayer:
    """Attention and MLP with their norms and residuals."""

    def __init__(
        self, spec: ModelSpec, parameters: Mapping[str, torch.Tensor], number: int
    ) -> None:
        prefix = f"layers.{number}"
        self.spec = spec
        self.number = number
        self.rope = spec.layers[number].rope
        self.attention_norm = _Norm(spec, parameters, f"{prefix}.attention_norm")
        self.qkv = _Linear(parameters, f"{prefix}.qkv")
        self.query_norm = _Norm(spec, parameters, f"{prefix}.query_norm")
        self.key_norm = _Norm(spec, parameters, f"{prefix}.key_norm")
        self.output = _Linear(parameters, f"{prefix}.output")
        self.after_attention_norm = _Norm(spec, parameters, f"{prefix}.after_attention_norm")
        self.mlp_norm = _Norm(spec, parameters, f"{prefix}.mlp_norm")
        self.gate_up = _Linear(parameters, f"{prefix}.gate_up")
        self.down = _Linear(parameters, f"{prefix}.down")
        self.after_mlp_norm = _Norm(spec, parameters, f"{prefix}.after_mlp_norm")
        self.activate = silu_and_multiply if spec.activation == "silu" else gelu_tanh_and_multiply

    def forward(
        self, x: torch.Tensor, angles: list[Angles], attention: AttentionBackend
    ) -> torch.Tensor:
        """[T, C] → [T, C]; KV of these tokens goes to the pages."""
        found = self._attend(self.attention_norm(x), angles[self.rope], attention)
        x = x + self.after_attention_norm(found)
        found = self.down(self.activate(self.gate_up(self.mlp_norm(x))))  # [T, 2 I] → [T, C]
        return x + self.after_mlp_norm(found)

    def _attend(self, x: torch.Tensor, angles: Angles, attention: AttentionBackend) -> torch.Tensor:
        spec, num_tokens = self.spec, x.shape[0]
        heads = self.qkv(x).view(num_tokens, -1, spec.head_dim)  # [T, H + 2 K, D]
        sizes = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
        query, key, value = torch.split(heads, sizes, dim=1)
        query = apply_rope(self.query_norm(query), *angles)
        key = apply_rope(self.key_norm(key), *angles)
        found = attention.attend(self.number, query, key, value)  # [T, H, D]
        return self.output(found.reshape(num_tokens, -1))


class Decoder:
    """A whole model. It owns no tensors: the parameters are lent by the runner.

    Args:
        parameters: by the names of `parameters.py`; `rope_factors` is optional.
    """

    def __init__(self, spec: ModelSpec, parameters: Mapping[str, torch.Tensor]) -> None:
        self.spec = spec
        self.embedding = parameters["embedding.weight"]  # [V, C]
        self.head = parameters.get("head.weight", self.embedding)  # [V, C]
        self.layers = [DecoderLayer(spec, parameters, n) for n in range(spec.num_layers)]
        self.final_norm = _Norm(spec, parameters, "final_norm")
        device, factors = self.embedding.device, parameters.get("rope_factors")
        self.ropes = [RotaryAngles(rope, spec.head_dim, device, factors) for rope in spec.ropes]
        # Rounded like the product it stands for in a model of lower precision.
        self.scale = torch.tensor(spec.embedding_scale).to(self.embedding.dtype).item()

    def forward(self, step: StepTensors, attention: AttentionBackend) -> torch.Tensor:
        """Hidden states [T, C] after the last layer, before the final norm."""
        attention.plan(step)
        x = functional.embedding(step.token_ids, self.embedding)
        if self.scale != 1.0:
            x = x * self.scale
        angles = [rope.at(step.positions, x.dtype) for rope in self.ropes]
        for layer in self.layers:
            x = layer.forward(x, angles, attention)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[R, C] → [R, V] in float32."""
        logits = linear(self.final_norm(x), self.head).float()
        if self.spec.logit_softcap is not None:
            logits = self.spec.logit_softcap * torch.tanh(logits / self.spec.logit_softcap)
        return logits
