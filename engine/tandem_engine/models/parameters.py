"""Names and shapes of a model's parameters, and the checkpoint tensors that each is made of.

Ours are fused where one matrix product does the work of several: QKV, and gate with up. Checkpoint
names are those of transformers, into which `weights/gguf_names.py` translates GGUF's.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from tandem_engine.spec.latent import LatentSpec
from tandem_engine.spec.model import ModelSpec
from tandem_engine.spec.moe import MoeSpec

Split = Literal["rows", "columns", "vocabulary"]
"""How tensor parallelism cuts a parameter (`shard.py`): each part along its rows; along its last
dimension, which fits the rows of the layer before; or along rows that are padded to the same number
on every rank."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of ours: checkpoint tensors `parts`, of shapes `part_shapes`, joined along rows.

    `offset` is added to each element on loading (norm weights of Gemma). Without a `split` every
    rank holds all of it. `in_float32` parameters are float32 whatever the model's dtype. `units` is
    the number of pieces (heads) of each part that no cut may divide; if empty, every row or column
    is one. A part of fewer units than the first (KV heads beside query heads) is repeated where
    there are more ranks than units.
    """

    name: str
    parts: tuple[str, ...]
    part_shapes: tuple[tuple[int, ...], ...]
    offset: float = 0.0
    split: Split | None = None
    units: tuple[int, ...] = ()
    in_float32: bool = False

    def dtype_in(self, model: torch.dtype) -> torch.dtype:
        """This parameter's dtype in a model of dtype `model`."""
        return torch.float32 if self.in_float32 else model

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parts joined."""
        return (sum(shape[0] for shape in self.part_shapes), *self.part_shapes[0][1:])


def _linear(
    name: str,
    parts: list[tuple[str, int]],
    columns: int,
    bias: bool,
    split: Split | None = None,
    units: tuple[int, ...] = (),
) -> list[Parameter]:
    """A fused linear layer whose parts have the given numbers of rows."""
    parameters = [
        Parameter(
            f"{name}.weight",
            tuple(f"{part}.weight" for part, _ in parts),
            tuple((rows, columns) for _, rows in parts),
            split=split,
            units=units,
        )
    ]
    if bias:
        names = tuple(f"{part}.bias" for part, _ in parts)
        shapes = tuple((rows,) for _, rows in parts)
        # Ranks add up the results of a product cut along columns; the first rank adds the bias.
        if split == "columns":
            parameters.append(Parameter(f"{name}.bias", names, shapes))
        else:
            parameters.append(Parameter(f"{name}.bias", names, shapes, split=split, units=units))
    return parameters


def _experts(moe: MoeSpec, hidden: int, ours: str, theirs: str) -> list[Parameter]:
    """A sparse layer: the router, all experts stacked, and the experts that every token uses.

    The experts' gate_up is [E · 2 I, C], each gate above its up, and their down [E · C, I]. Every
    rank has the router and a slice of each expert.
    """
    names, size = moe.names, moe.intermediate_size

    def whole(name: str, part: str, *shape: int) -> Parameter:
        return Parameter(f"{ours}.{name}", (f"{theirs}.{part}",), (shape,))

    parameters = [whole("router.weight", "gate.weight", moe.num_experts, hidden)]
    if moe.score_bias:
        parameters.append(whole("router.bias", "gate.e_score_correction_bias", moe.num_experts))
    every = [f"{theirs}.experts.{number}" for number in range(moe.num_experts)]
    parts = [(f"{expert}.{part}", size) for expert in every for part in (names.gate, names.up)]
    parameters += _linear(f"{ours}.experts_gate_up", parts, hidden, False, "rows")
    parts = [(f"{expert}.{names.down}", hidden) for expert in every]
    parameters += _linear(f"{ours}.experts_down", parts, size, False, "columns")
    if moe.shared_size:
        shared = f"{theirs}.{names.shared}"
        parts = [(f"{shared}.{part}", moe.shared_size) for part in (names.gate, names.up)]
        parameters += _linear(f"{ours}.shared.gate_up", parts, hidden, False, "rows")
        parts = [(f"{shared}.{names.down}", hidden)]
        parameters += _linear(f"{ours}.shared.down", parts, moe.shared_size, False, "columns")
    if moe.shared_gate:
        parameters.append(whole("shared_gate.weight", "shared_expert_gate.weight", 1, hidden))
    return parameters


def _norm(spec: ModelSpec, name: str, part: str, size: int) -> Parameter:
    return Parameter(
        f"{name}.weight",
        (f"{part}.weight",),
        ((size,),),
        spec.norm_offset,
        in_float32=spec.norm_in_float32,
    )


def _head_attention(spec: ModelSpec, ours: str, theirs: str) -> list[Parameter]:
    """Attention over heads: queries, keys and values are projected in one product."""
    hidden, head = spec.hidden_size, spec.head_dim
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    parts = [(f"{theirs}.{x}_proj", count * head) for x, count in zip("qkv", heads, strict=True)]
    parameters = _linear(f"{ours}.qkv", parts, hidden, spec.qkv_bias, "rows", heads)
    if spec.qk_norm:
        parameters.append(_norm(spec, f"{ours}.query_norm", f"{theirs}.q_norm", head))
        parameters.append(_norm(spec, f"{ours}.key_norm", f"{theirs}.k_norm", head))
    parts, size = [(f"{theirs}.o_proj", hidden)], spec.num_heads * head
    return parameters + _linear(
        f"{ours}.output", parts, size, spec.output_bias, "columns", (spec.num_heads,)
    )


def _latent_attention(
    spec: ModelSpec, latent: LatentSpec, ours: str, theirs: str
) -> list[Parameter]:
    """Latent attention. Every rank has the latent's first projection, fused with the query's."""
    hidden, heads, rank = spec.hidden_size, spec.num_heads, latent.query_rank
    query = heads * latent.query_dim
    shared = (f"{theirs}.kv_a_proj_with_mqa", latent.width)
    parameters: list[Parameter] = []
    if rank is None:
        parts = [(f"{theirs}.q_proj", query), shared]
        parameters += _linear(f"{ours}.latent_in", parts, hidden, False, "rows", (heads, 1))
    else:
        parts = [(f"{theirs}.q_a_proj", rank), shared]
        parameters += _linear(f"{ours}.latent_in", parts, hidden, False)
        parameters.append(_norm(spec, f"{ours}.query_latent_norm", f"{theirs}.q_a_layernorm", rank))
        parts = [(f"{theirs}.q_b_proj", query)]
        parameters += _linear(f"{ours}.query_up", parts, rank, False, "rows", (heads,))
    parameters.append(_norm(spec, f"{ours}.latent_norm", f"{theirs}.kv_a_layernorm", latent.rank))
    parts = [(f"{theirs}.kv_b_proj", heads * (latent.nope_dim + latent.value_dim))]
    parameters += _linear(f"{ours}.latent_up", parts, latent.rank, False, "rows", (heads,))
    parts, size = [(f"{theirs}.o_proj", hidden)], heads * latent.value_dim
    return parameters + _linear(f"{ours}.output", parts, size, False, "columns", (heads,))


def build_parameters(spec: ModelSpec) -> list[Parameter]:
    """Every parameter of the model, in the order of a forward pass."""
    hidden = spec.hidden_size

    def norm(name: str, part: str) -> Parameter:
        return _norm(spec, name, part, hidden)

    def vocabulary(name: str, part: str) -> Parameter:
        shape = (spec.vocab_size, hidden)
        return Parameter(f"{name}.weight", (f"{part}.weight",), (shape,), split="vocabulary")

    parameters = [vocabulary("embedding", "model.embed_tokens")]
    for layer in range(spec.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        parameters.append(norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm"))
        if spec.latent is not None:
            parameters += _latent_attention(spec, spec.latent, ours, attention)
        else:
            parameters += _head_attention(spec, ours, attention)
        if spec.sandwich_norm:
            parameters.append(
                norm(f"{ours}.after_attention_norm", f"{theirs}.post_attention_layernorm")
            )
            parameters.append(norm(f"{ours}.mlp_norm", f"{theirs}.pre_feedforward_layernorm"))
        else:
            parameters.append(norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm"))
        if spec.moe is not None and spec.is_sparse(layer):
            parameters += _experts(spec.moe, hidden, ours, f"{theirs}.{spec.moe.names.block}")
        else:
            parts = [(f"{mlp}.{x}_proj", spec.intermediate_size) for x in ("gate", "up")]
            parameters += _linear(f"{ours}.gate_up", parts, hidden, spec.mlp_bias, "rows")
            parts, size = [(f"{mlp}.down_proj", hidden)], spec.intermediate_size
            parameters += _linear(f"{ours}.down", parts, size, spec.mlp_bias, "columns")
        if spec.sandwich_norm:
            parameters.append(
                norm(f"{ours}.after_mlp_norm", f"{theirs}.post_feedforward_layernorm")
            )
    parameters.append(norm("final_norm", "model.norm"))
    if not spec.tied_embeddings:
        parameters.append(vocabulary("head", "lm_head"))
    return parameters
