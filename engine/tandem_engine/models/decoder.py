"""The decoder that all families share. Their differences come from `ModelSpec`.

The sum that layers add to (`residual`) is carried beside what they compute (`x`), so that adding
and the norm that follows are one operation.

Legend: T tokens of the step (all sequences, flat), R rows of it whose logits are wanted, C hidden
size, H query heads, K KV heads, D head dimension, V vocabulary.
"""

from copy import copy

import torch

from tandem_engine.attention.backend import StepTensors
from tandem_engine.models.collective import ALONE, Collective
from tandem_engine.models.layer_attention import (
    Angles,
    Backend,
    HeadAttention,
    LatentAttention,
    LayerAttention,
    Projected,
)
from tandem_engine.models.layers import (
    Embedding,
    GatedMlp,
    Norm,
    Parameters,
    PartialLinear,
)
from tandem_engine.models.moe import MoeMlp
from tandem_engine.models.rope import RotaryAngles
from tandem_engine.spec.model import ModelSpec
from tandem_kernels.linear import wide_linear


class DecoderLayer:
    """Attention and MLP with their norms, except for the norm before attention.

    Args:
        next_norm: the norm before the next layer's attention, or the model's last norm.
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
        """What `project` returned → attn_output [T, H · D], before the output projection."""
        return self.attention.attend(projected, angles[self.rope], attention, out)

    def feed_forward(self, attn_output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """attn_output [T, H · D] → what the next layer starts from, [T, C].

        Attention and the MLP are added to `residual`, in place.
        """
        x = self.output(attn_output)
        x = self._add(x, self.after_attention_norm, residual, self.mlp_norm)
        return self._add(self.mlp(x), self.after_mlp_norm, residual, self.next_norm)

    def _add(
        self, part: torch.Tensor, after: Norm | None, residual: torch.Tensor, norm: Norm
    ) -> torch.Tensor:
        """residual += the sum of all ranks' parts, through the norm `after` where there is one."""
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


class Decoder:
    """A whole model. It owns no parameters: the runner lends them.

    Args:
        spec: of what this rank computes, which is its own heads.
        parameters: this rank's slices by the names of `parameters.py`; `rope_factors` is optional.
        collective: adds up and gathers what each rank has a part of.
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

        Its steps use all the kernels that the whole model's steps use. Their results mean nothing.
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
        """Hidden states after the final norm: [T, C], or with `rows` [R] only theirs, [R, C].

        Every token's KV is stored. The last layer's MLP is computed for `rows` alone.
        """
        attention.plan(step)
        residual, angles = self.enter(step.token_ids, step.positions)
        x = self.start(residual)
        for layer in self.layers[:-1]:
            attn_output = layer.attend(layer.project(x, angles, attention), angles, attention)
            x = layer.feed_forward(attn_output, residual)
        last = self.layers[-1]
        attn_output = last.attend(last.project(x, angles, attention), angles, attention)
        return self.leave(attn_output, residual, rows)

    def enter(
        self, token_ids: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, list[Angles]]:
        """Ids and positions [T] → residual to which layers add [T, C], each rope's angles."""
        residual = self.embedding(token_ids).to(self.residual_dtype)
        if self.spec.embedding_scale != 1.0:
            residual = residual * self.spec.embedding_scale
        return residual, [rope.at(positions, self.dtype) for rope in self.ropes]

    def start(self, residual: torch.Tensor) -> torch.Tensor:
        """Residual → what the first layer starts from, [T, C]."""
        return self.first_norm(residual).to(self.dtype)

    def leave(
        self, attn_output: torch.Tensor, residual: torch.Tensor, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """From the last layer's attn_output to the result of `forward`. May change `residual`."""
        if rows is not None:
            attn_output, residual = attn_output[rows], residual[rows]
            if not rows.shape[0]:
                return residual
        return self.layers[-1].feed_forward(attn_output, residual)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[R, C] → [R, V] float32, into `out` where it is given."""
        logits = wide_linear(hidden, self.head, out=out if self.collective.is_alone else None)
        if self.spec.logit_softcap is not None:
            logits.div_(self.spec.logit_softcap).tanh_().mul_(self.spec.logit_softcap)
        return self.collective.gather(logits, self.spec.vocab_size, out)
