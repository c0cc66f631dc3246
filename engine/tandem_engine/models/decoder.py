"""The decoder that all families share; what differs comes from `ModelSpec`.

The sum that layers add to (`residual`) is carried beside what they compute (`x`), so that adding
and the next norm are one operation.

Legend: T tokens of the step (all sequences, flat), R rows of it whose logits are wanted, C hidden
size, H query heads, K KV heads, D head dimension, V vocabulary.
"""

import torch

from tandem_engine.attention.backend import AttentionBackend, HeadNorms, StepTensors
from tandem_engine.attention.latent_backend import LatentBackend
from tandem_engine.models.collective import ALONE, Collective
from tandem_engine.models.layers import (
    Embedding,
    GatedMlp,
    Linear,
    Norm,
    Parameters,
    PartialLinear,
)
from tandem_engine.models.mla import LatentAttention
from tandem_engine.models.moe import MoeMlp
from tandem_engine.models.rope import RotaryAngles
from tandem_engine.models.spec import ModelSpec
from tandem_kernels.linear import wide_linear

Angles = tuple[torch.Tensor, torch.Tensor]
Backend = AttentionBackend | LatentBackend


class HeadAttention:
    """Queries, keys and values of all heads by one projection."""

    def __init__(self, spec: ModelSpec, parameters: Parameters, number: int) -> None:
        prefix = f"layers.{number}"
        self.number = number
        self.qkv = Linear(parameters, f"{prefix}.qkv")
        self.norms = _head_norms(spec, parameters, prefix)

    def __call__(self, x: torch.Tensor, angles: Angles, attention: Backend) -> torch.Tensor:
        """[T, C] → [T, H · D]; KV of the tokens goes to the pages."""
        assert isinstance(attention, AttentionBackend)
        return attention.attend(self.number, self.qkv(x), angles, self.norms)


class DecoderLayer:
    """Attention and MLP with their norms, except the norm that comes first."""

    def __init__(
        self, spec: ModelSpec, parameters: Parameters, number: int, collective: Collective
    ) -> None:
        prefix = f"layers.{number}"
        self.number = number
        self.rope = spec.layers[number].rope
        kind = HeadAttention if spec.latent is None else LatentAttention
        self.attention = kind(spec, parameters, number)
        self.collective = collective
        self.output = PartialLinear(parameters, f"{prefix}.output", collective)
        self.mlp_norm = Norm(spec, parameters, f"{prefix}.mlp_norm")
        self.mlp = _mlp(spec, parameters, number, collective)
        self.after_attention_norm: Norm | None = None
        self.after_mlp_norm: Norm | None = None
        if spec.sandwich_norm:
            self.after_attention_norm = Norm(spec, parameters, f"{prefix}.after_attention_norm")
            self.after_mlp_norm = Norm(spec, parameters, f"{prefix}.after_mlp_norm")

    def attend(self, x: torch.Tensor, angles: list[Angles], attention: Backend) -> torch.Tensor:
        """[T, C] → [T, H · D], before the output projection; KV of the tokens goes to the pages."""
        return self.attention(x, angles[self.rope], attention)

    def feed_forward(
        self, found: torch.Tensor, residual: torch.Tensor, next_norm: Norm
    ) -> torch.Tensor:
        """What attention found [T, H · D] → what the next layer starts from [T, C].

        `residual` takes up what attention and the MLP add.
        """
        x = self.output(found)
        x = self._add(x, self.after_attention_norm, residual, self.mlp_norm)
        return self._add(self.mlp(x), self.after_mlp_norm, residual, next_norm)

    def _add(
        self, part: torch.Tensor, after: Norm | None, residual: torch.Tensor, norm: Norm
    ) -> torch.Tensor:
        """residual += the sum of all ranks' parts, normed first where a norm comes `after` them."""
        if after is None:
            return norm.add(part, residual, self.collective)
        return norm.add(after(self.collective.add(part)), residual, ALONE)


def _mlp(
    spec: ModelSpec, parameters: Parameters, number: int, collective: Collective
) -> GatedMlp | MoeMlp:
    prefix = f"layers.{number}"
    if spec.moe is not None and spec.is_sparse(number):
        return MoeMlp(spec, spec.moe, parameters, prefix, collective)
    return GatedMlp(spec, parameters, prefix, collective)


def _head_norms(spec: ModelSpec, parameters: Parameters, prefix: str) -> HeadNorms | None:
    if not spec.qk_norm:
        return None
    query = parameters[f"{prefix}.query_norm.weight"]
    key = parameters[f"{prefix}.key_norm.weight"]
    return HeadNorms(query, key, spec.norm_epsilon, spec.norm_in_float32)


class Decoder:
    """A whole model. It owns no tensors: the parameters are lent by the runner.

    Args:
        spec: of what this rank computes: its own heads.
        parameters: by the names of `parameters.py`, this rank's slices; `rope_factors` is optional.
        collective: through which ranks add up and gather what each has a part of.
    """

    def __init__(
        self, spec: ModelSpec, parameters: Parameters, collective: Collective = ALONE
    ) -> None:
        self.spec = spec
        self.collective = collective
        embedding = parameters["embedding.weight"]
        self.embedding = Embedding(embedding, collective)
        self.head = parameters.get("head.weight", embedding)  # [V / ranks, C]
        numbers = range(spec.num_layers)
        self.layers = [DecoderLayer(spec, parameters, n, collective) for n in numbers]
        names = [f"layers.{n}.attention_norm" for n in range(spec.num_layers)] + ["final_norm"]
        self.norms = [Norm(spec, parameters, name) for name in names]
        device, factors = embedding.device, parameters.get("rope_factors")
        self.ropes = [
            RotaryAngles(rope, spec.head_dim, spec.max_position, device, factors)
            for rope in spec.ropes
        ]
        self.dtype = embedding.dtype

    def forward(
        self, step: StepTensors, attention: Backend, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states after the final norm, [T, C], or [R, C] of `rows` [R] alone.

        Every token's KV is stored. What only concerns rows that nobody wants is left out.
        """
        attention.plan(step)
        residual = self.embedding(step.token_ids)
        if self.spec.residual_in_float32:
            residual = residual.float()
        if self.spec.embedding_scale != 1.0:
            residual = residual * self.spec.embedding_scale
        angles = [rope.at(step.positions, self.dtype) for rope in self.ropes]
        x = self.norms[0](residual).to(self.dtype)
        for layer, next_norm in zip(self.layers, self.norms[1:], strict=True):
            found = layer.attend(x, angles, attention)
            if rows is not None and layer.number == self.spec.num_layers - 1:
                found, residual = found[rows], residual[rows]
                if not rows.shape[0]:
                    return residual
            x = layer.feed_forward(found, residual, next_norm)
        return x

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[R, C] → [R, V] float32, into `out` where it is given."""
        logits = wide_linear(hidden, self.head, out=out if self.collective.is_alone else None)
        if self.spec.logit_softcap is not None:
            logits.div_(self.spec.logit_softcap).tanh_().mul_(self.spec.logit_softcap)
        return self.collective.gather(logits, self.spec.vocab_size, out)
