"""Names and shapes of a model's parameters, and the checkpoint tensors that each is made of.

Ours are fused where one matrix product does the work of several: QKV, and gate with up. Checkpoint
names are those of transformers; `weights/gguf_names.py` translates GGUF's into them.
"""

from dataclasses import dataclass

from tandem_engine.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of ours: checkpoint tensors `parts`, of shapes `part_shapes`, joined along rows.

    `offset` is added to each element on loading (norm weights of Gemma).
    """

    name: str
    parts: tuple[str, ...]
    part_shapes: tuple[tuple[int, ...], ...]
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape after joining."""
        return (sum(shape[0] for shape in self.part_shapes), *self.part_shapes[0][1:])


def _linear(name: str, parts: list[tuple[str, int]], columns: int, bias: bool) -> list[Parameter]:
    """A fused linear layer whose parts have the given numbers of rows."""
    found = [
        Parameter(
            f"{name}.weight",
            tuple(f"{part}.weight" for part, _ in parts),
            tuple((rows, columns) for _, rows in parts),
        )
    ]
    if bias:
        names = tuple(f"{part}.bias" for part, _ in parts)
        found.append(Parameter(f"{name}.bias", names, tuple((rows,) for _, rows in parts)))
    return found


def build_parameters(spec: ModelSpec) -> list[Parameter]:
    """Every parameter of the model, in the order in which a forward pass uses them."""
    hidden, head = spec.hidden_size, spec.head_dim
    query, kv = spec.num_heads * head, spec.num_kv_heads * head

    def norm(name: str, part: str, size: int = hidden) -> Parameter:
        return Parameter(f"{name}.weight", (f"{part}.weight",), ((size,),), spec.norm_offset)

    found = [
        Parameter("embedding.weight", ("model.embed_tokens.weight",), ((spec.vocab_size, hidden),))
    ]
    for layer in range(spec.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        found.append(norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm"))
        parts = [
            (f"{attention}.{x}_proj", rows) for x, rows in zip("qkv", (query, kv, kv), strict=True)
        ]
        found += _linear(f"{ours}.qkv", parts, hidden, spec.qkv_bias)
        if spec.qk_norm:
            found.append(norm(f"{ours}.query_norm", f"{attention}.q_norm", head))
            found.append(norm(f"{ours}.key_norm", f"{attention}.k_norm", head))
        found += _linear(
            f"{ours}.output", [(f"{attention}.o_proj", hidden)], query, spec.output_bias
        )
        if spec.sandwich_norm:
            found.append(norm(f"{ours}.after_attention_norm", f"{theirs}.post_attention_layernorm"))
            found.append(norm(f"{ours}.mlp_norm", f"{theirs}.pre_feedforward_layernorm"))
        else:
            found.append(norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm"))
        parts = [(f"{mlp}.{x}_proj", spec.intermediate_size) for x in ("gate", "up")]
        found += _linear(f"{ours}.gate_up", parts, hidden, spec.mlp_bias)
        parts = [(f"{mlp}.down_proj", hidden)]
        found += _linear(f"{ours}.down", parts, spec.intermediate_size, spec.mlp_bias)
        if spec.sandwich_norm:
            found.append(norm(f"{ours}.after_mlp_norm", f"{theirs}.post_feedforward_layernorm"))
    found.append(norm("final_norm", "model.norm"))
    if not spec.tied_embeddings:
        found.append(Parameter("head.weight", ("lm_head.weight",), ((spec.vocab_size, hidden),)))
    return found
