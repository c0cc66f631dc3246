"""What a model is made of, as data: `models/decoder.py` reads it and never asks for the family."""

from dataclasses import dataclass
from typing import Literal

from tandem_engine.spec.latent import LatentSpec
from tandem_engine.spec.moe import MoeSpec
from tandem_engine.spec.rope import RopeSpec

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer's attention. A `window` is the tokens that a query sees, itself included."""

    window: int | None
    rope: int
    """Index into `ModelSpec.ropes`."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer, dense or with experts.

    `norm_offset` is added to every norm weight of a checkpoint in the Hugging Face form (Gemma
    stores weight - 1). `sandwich_norm`: attention and MLP outputs are normed before they are added.
    `norm_in_float32`: norm weights are float32 whatever the model's dtype, and are applied before
    rounding to it (Gemma, whose weights lie close to 1). `residual_in_float32`: the sum that the
    layers add to is float32 whatever the model's dtype (Gemma, where it grows to thousands, too
    large for bfloat16 to take up what a layer adds).
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_epsilon: float
    attention_scale: float
    activation: Activation
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norm: bool = False
    norm_offset: float = 0.0
    norm_in_float32: bool = False
    residual_in_float32: bool = False
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    moe: MoeSpec | None = None
    latent: LatentSpec | None = None
    """Where it is set, `head_dim` is the size of the rotated part and `num_kv_heads` is unused."""

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts in place of the dense MLP."""
        return self.moe is not None and self.moe.sparse[layer]
