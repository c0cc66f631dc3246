"""The decoder that all families share; what differs comes from `ModelSpec`.

The sum that layers add to (`residual`) is carried beside what they compute (`x`), so that adding
and the next norm are one operation.

Legend: T tokens of the step (all sequences, flat), R rows of it whose logits are wanted, C hidden
size, H query heads, K KV heads, D head dimension, V vocabulary.
"""

from copy import copy

import torch

from tandem_engine.attention.backend import AttentionBackend, HeadNorms, StepTensors
from tandem_engine.models.collective import ALONE, Collective
from tandem_engine.models.layer_attention import Angles, Backend, LayerAttention, Projected
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
from tandem_engine.spec.model import ModelSpec
from tandem_kernels.linear import wide_linear


class HeadAttention(LayerAttention):
    """Queries, keys and values of all heads by one projection."""

    def __init__(self, spec: ModelSpec, parameters: Parameters, number: int) -> None:
        prefix = f"layers.{number}"
        self.number = number
        self.qkv = Linear(parameters, f"{prefix}.qkv")
        self.norms = _head_norms(spec, parameters, prefix)

    @property
    def widths(self) -> tuple[int, ...]:
        """The one projection's."""
        return (self.qkv.weight.shape[0],)

    def project(
        self, x: torch.Tensor, angles: Angles, attention: Backend, out: Projected | None = None
    ) -> Projected:
        """[T, C] → queries [T, H, D]; KV of the tokens goes to the pages."""
        assert isinstance(attention, AttentionBackend)
        qkv = self.qkv(x, None if out is None else out[0])
        return (attention.store(self.number, qkv, angles, self.norms),)

    def attend(
        self,
        projected: Projected,
        angles: Angles,
        attention: Backend,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries [T, H, D] → [T, H · D]."""
        assert isinstance(attention, AttentionBackend)
        return attention.attend(self.number, projected[0], out)


class DecoderLayer:
    """Attention and MLP with their norms, except the norm that comes first.

    Args:
        next_norm: the first one of the next layer, or the model's last.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parameters: Parameters,
        number: int,
        collective: Collective,
        next_norm: Norm,
    ) -> None:
        prefix = f"layers.{number}"
        self.number = number
        self.rope = spec.layers[number].rope
        kind = HeadAttention if spec.latent is None else LatentAttention
        self.attention: LayerAttention = kind(spec, parameters, number)
        self.collective = collective
        self.output = PartialLinear(parameters, f"{prefix}.output", collective)
        self.mlp_norm = Norm(spec, parameters, f"{prefix}.mlp_norm")
        self.mlp = _mlp(spec, parameters, number, collective)
        self.next_norm = next_norm
        self.after_attention_norm: Norm | None = None
        self.after_mlp_norm: Norm | None = None
        if spec.sandwich_norm:
            self.after_attention_norm = Norm(spec, parameters, f"{prefix}.after_attention_norm")
            self.after_mlp_norm = Norm(spec, parameters, f"{prefix}.after_mlp_norm")

    def project(
        self,
        x: torch.Tensor,
        angles: list[Angles],
        attention: Backend,
        out: Projected | None = None,
    ) -> Projected:
        """[T, C] → what `attend` takes."""
        return self.attention.project(x, angles[self.rope], attention, out)

    def attend(
        self,
        projected: Projected,
        angles: list[Angles],
        attention: Backend,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """→ [T, H · D], before the output projection."""
        return self.attention.attend(projected, angles[self.rope], attention, out)

    def feed_forward(self, found: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What attention found [T, H · D] → what the next layer starts from [T, C].

        `residual` takes up what attention and the MLP add.
        """
        x = self.output(found)
        x = self._add(x, self.after_attention_norm, residual, self.mlp_norm)
        return self._add(self.mlp(x), self.after_mlp_norm, residual, self.next_norm)

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
        names = [f"layers.{n}.attention_norm" for n in range(spec.num_layers)] + ["final_norm"]
        self.first_norm, *norms = [Norm(spec, parameters, name) for name in names]
        self.layers = [
            DecoderLayer(spec, parameters, number, collective, norm)
            for number, norm in enumerate(norms)
        ]
        device, factors = embedding.device, parameters.get("rope_factors")
        self.ropes = [
            RotaryAngles(rope, spec.head_dim, spec.max_position, device, factors)
            for rope in spec.ropes
        ]
        self.dtype = embedding.dtype
        self.residual_dtype = torch.float32 if spec.residual_in_float32 else self.dtype

    def abridged(self) -> "Decoder":
        """This model with one layer of each kind, the last layer among them.

        Its steps take all the kernels that the whole model's steps take; their results mean
        nothing.
        """
        kinds = {
            (self.spec.layers[layer.number], self.spec.is_sparse(layer.number)): layer
            for layer in self.layers
        }
        found = copy(self)
        found.layers = sorted(kinds.values(), key=lambda layer: layer.number)
        return found

    def forward(
        self, step: StepTensors, attention: Backend, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states after the final norm, [T, C], or [R, C] of `rows` [R] alone.

        Every token's KV is stored. What only concerns rows that nobody wants is left out.
        """
        attention.plan(step)
        residual, angles = self.enter(step.token_ids, step.positions)
        x = self.start(residual)
        for layer in self.layers[:-1]:
            found = layer.attend(layer.project(x, angles, attention), angles, attention)
            x = layer.feed_forward(found, residual)
        last = self.layers[-1]
        found = last.attend(last.project(x, angles, attention), angles, attention)
        return self.leave(found, residual, rows)

    def enter(
        self, token_ids: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, list[Angles]]:
        """What the layers add to, [T, C], and each rope's angles, for ids and positions [T]."""
        residual = self.embedding(token_ids).to(self.residual_dtype)
        if self.spec.embedding_scale != 1.0:
            residual = residual * self.spec.embedding_scale
        return residual, [rope.at(positions, self.dtype) for rope in self.ropes]

    def start(self, residual: torch.Tensor) -> torch.Tensor:
        """What the first layer computes from, [T, C]."""
        return self.first_norm(residual).to(self.dtype)

    def leave(
        self, found: torch.Tensor, residual: torch.Tensor, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """The last layer's end: `forward`'s result; `residual` may be changed."""
        if rows is not None:
            found, residual = found[rows], residual[rows]
            if not rows.shape[0]:
                return residual
        return self.layers[-1].feed_forward(found, residual)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[R, C] → [R, V] float32, into `out` where it is given."""
        logits = wide_linear(hidden, self.head, out=out if self.collective.is_alone else None)
        if self.spec.logit_softcap is not None:
            logits.div_(self.spec.logit_softcap).tanh_().mul_(self.spec.logit_softcap)
        return self.collective.gather(logits, self.spec.vocab_size, out)
