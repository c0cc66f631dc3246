"""A model family's differences, as data: what `decoder.py` reads instead of branching on names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from tandem_engine.spec.latent import LatentSpec, latent_scale, latent_spec
from tandem_engine.spec.moe import ExpertNames, MoeSpec
from tandem_engine.spec.rope import RopeSpec, rope_spec
from tandem_wire.model_config import ModelFacts
from tandem_wire.model_error import BadModelFileError, UnsupportedModelError

Activation = Literal["silu", "gelu_tanh"]

_ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer's attention. `window`: a query sees itself and the window - 1 positions before."""

    window: int | None
    rope: int
    """Index into `ModelSpec.ropes`."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer, dense or with experts.

    `norm_offset` is added to every norm weight of a checkpoint in the Hugging Face form (Gemma
    stores weight - 1). `sandwich_norm`: attention and MLP outputs are normed before they are added.
    `norm_in_float32`: the norms' weights are float32 in every model, and applied before rounding to
    the model's dtype (Gemma, whose weights are small numbers above or below 1).
    `residual_in_float32`: what the layers add up is float32 in every model (Gemma, where it grows
    to thousands, past what they add).
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
    """With it, `head_dim` is the size of the rotated part, and `num_kv_heads` is of no use."""

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts in place of the dense MLP."""
        return self.moe is not None and self.moe.sparse[layer]

    @property
    def qkv_size(self) -> int:
        """Rows of the fused QKV projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def build_spec(facts: ModelFacts) -> ModelSpec:
    """The spec of a model from its config.

    Raises:
        UnsupportedModelError: no such family, or a feature of it that is not there.
        BadModelFileError: the config lacks a field.
    """
    family = facts.architecture
    if family not in _FAMILIES:
        raise UnsupportedModelError(
            f"Tandem has no model of type {family!r}", f"use one of {', '.join(sorted(_FAMILIES))}"
        )
    if facts.config.get("quantization_config"):
        raise UnsupportedModelError(
            "the model's safetensors are quantised, which is not read yet",
            "use its weights in bfloat16 or float16, or a GGUF file",
        )
    try:
        return _FAMILIES[family](_Config(facts.config))
    except KeyError as error:
        raise BadModelFileError(
            f"the model's config lacks {error}", "use a complete model"
        ) from error


class _Config:
    """Reads a config.json that leaves out what is the default."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


def _shape(config: _Config, **defaults: Any) -> dict[str, Any]:
    """The fields that every family has; `defaults` are the family's own."""
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim", defaults.get("head_dim", config["hidden_size"] // heads)))
    name = str(config.get("hidden_activation", config.get("hidden_act", "silu")))
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"the model's activation {name!r} is not known", f"use {', '.join(_ACTIVATIONS)}"
        )
    return {
        "family": str(config["model_type"]),
        "num_layers": int(config["num_hidden_layers"]),
        "hidden_size": int(config["hidden_size"]),
        "intermediate_size": int(config["intermediate_size"]),
        "num_heads": heads,
        "num_kv_heads": int(config.get("num_key_value_heads", heads)),
        "head_dim": head_dim,
        "vocab_size": int(config["vocab_size"]),
        "max_position": int(config["max_position_embeddings"]),
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "attention_scale": head_dim**-0.5,
        "activation": _ACTIVATIONS[name],
        "tied_embeddings": bool(
            config.get("tie_word_embeddings", defaults.get("tie_word_embeddings", False))
        ),
    }


def _windows(config: _Config, window: int | None) -> list[int | None]:
    """Each layer's window, from `layer_types` where the config has them."""
    num_layers = int(config["num_hidden_layers"])
    kinds = config.get("layer_types", None)
    if kinds is None:
        return [window] * num_layers
    known = {"full_attention", "sliding_attention"}
    if set(kinds) - known:
        raise UnsupportedModelError(
            f"layer types {sorted(set(kinds) - known)} are not known", f"use {sorted(known)}"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _one_rope(config: _Config, windows: list[int | None], theta: float) -> dict[str, Any]:
    layers = tuple(LayerSpec(window, 0) for window in windows)
    return {"layers": layers, "ropes": (rope_spec(config.values, None, theta),)}


def _llama(config: _Config) -> ModelSpec:
    bias = bool(config.get("attention_bias", False))
    return ModelSpec(
        **_shape(config),
        **_one_rope(config, [None] * int(config["num_hidden_layers"]), 10000.0),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def _mistral(config: _Config) -> ModelSpec:
    windows = _windows(config, config.get("sliding_window", None))
    return ModelSpec(**_shape(config), **_one_rope(config, windows, 10000.0))


def _qwen_windows(config: _Config) -> list[int | None]:
    """Qwen's config carries a window that is off unless `use_sliding_window` is set."""
    num_layers = int(config["num_hidden_layers"])
    if not config.get("use_sliding_window", False):
        return [None] * num_layers
    window = config.get("sliding_window", None)
    if config.get("layer_types", None) is not None:
        return _windows(config, window)
    first = int(config.get("max_window_layers", 28))
    return [window if layer >= first else None for layer in range(num_layers)]


def _qwen2(config: _Config) -> ModelSpec:
    rope = _one_rope(config, _qwen_windows(config), 10000.0)
    return ModelSpec(**_shape(config), **rope, qkv_bias=True)


def _qwen3(config: _Config) -> ModelSpec:
    bias = bool(config.get("attention_bias", False))
    rope = _one_rope(config, _qwen_windows(config), 10000.0)
    shape = _shape(config, head_dim=128)
    return ModelSpec(**shape, **rope, qk_norm=True, qkv_bias=bias, output_bias=bias)


def _mixtral(config: _Config) -> ModelSpec:
    shape = _shape(config)
    window = config.get("sliding_window", None)
    moe = MoeSpec(
        num_experts=int(config.get("num_local_experts", config.get("num_experts", 8))),
        intermediate_size=shape["intermediate_size"],
        top_k=int(config.get("num_experts_per_tok", 2)),
        sparse=(True,) * shape["num_layers"],
        renormalise=True,
        names=ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    )
    windows = [window] * shape["num_layers"]
    return ModelSpec(**shape, **_one_rope(config, windows, 1_000_000.0), moe=moe)


def _qwen_experts(config: _Config, top_k: int, **shared: Any) -> MoeSpec | None:
    """Experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` doesn't name."""
    count = int(config.get("num_experts", config.get("num_local_experts", 0)))
    step = int(config.get("decoder_sparse_step", 1))
    dense = set(config.get("mlp_only_layers", []))
    sparse = tuple(
        count > 0 and layer not in dense and (layer + 1) % step == 0
        for layer in range(int(config["num_hidden_layers"]))
    )
    if not any(sparse):
        return None
    return MoeSpec(
        num_experts=count,
        intermediate_size=int(config["moe_intermediate_size"]),
        top_k=int(config.get("num_experts_per_tok", top_k)),
        sparse=sparse,
        renormalise=bool(config.get("norm_topk_prob", False)),
        **shared,
    )


def _qwen2_moe(config: _Config) -> ModelSpec:
    moe = _qwen_experts(
        config,
        top_k=4,
        shared_size=int(config["shared_expert_intermediate_size"]),
        shared_gate=True,
    )
    windows = _qwen_windows(config)
    if config.get("layer_types", None) is None:
        # Where they aren't listed, every second layer before `max_window_layers` has the window.
        last = int(config.get("max_window_layers", 28))
        window = config.get("sliding_window", None)
        switched = bool(config.get("use_sliding_window", False))
        windows = [
            window if switched and layer % 2 == 0 and layer < last else None
            for layer in range(len(windows))
        ]
    rope = _one_rope(config, windows, 10000.0)
    bias = bool(config.get("qkv_bias", True))
    return ModelSpec(**_shape(config), **rope, qkv_bias=bias, moe=moe)


def _qwen3_moe(config: _Config) -> ModelSpec:
    bias = bool(config.get("attention_bias", False))
    # Unlike in Qwen3, a window that is switched on holds for every layer.
    window = config.get("sliding_window", None)
    windows = [window if config.get("use_sliding_window", False) else None]
    rope = _one_rope(config, windows * int(config["num_hidden_layers"]), 10000.0)
    moe = _qwen_experts(config, top_k=8)
    shape = _shape(config)
    return ModelSpec(**shape, **rope, qk_norm=True, qkv_bias=bias, output_bias=bias, moe=moe)


def _gemma3(config: _Config) -> ModelSpec:
    shape = _shape(config, head_dim=256, tie_word_embeddings=True)
    shape["attention_scale"] = float(config.get("query_pre_attn_scalar", 256)) ** -0.5
    num_layers = shape["num_layers"]
    window = int(config.get("sliding_window", 4096))
    pattern = int(config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6)))
    windows: list[int | None] = [
        None if (layer + 1) % pattern == 0 else window for layer in range(num_layers)
    ]
    if config.get("layer_types", None) is not None:
        windows = _windows(config, window)
    bias = bool(config.get("attention_bias", False))
    return ModelSpec(
        **shape,
        layers=tuple(LayerSpec(window, 0 if window is None else 1) for window in windows),
        ropes=(
            rope_spec(config.values, "full_attention", 1_000_000.0),
            rope_spec(config.values, "sliding_attention", 10_000.0),
        ),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        sandwich_norm=True,
        norm_offset=1.0,
        norm_in_float32=True,
        residual_in_float32=True,
        embedding_scale=shape["hidden_size"] ** 0.5,
        attention_softcap=config.get("attn_logit_softcapping", None),
        logit_softcap=config.get("final_logit_softcapping", None),
    )


def _deepseek_experts(config: _Config) -> MoeSpec | None:
    """Softmax scores in V2; in V3 sigmoids, a bias for the choice, and groups of experts."""
    num_layers = int(config["num_hidden_layers"])
    sparse = tuple(layer >= config.get("first_k_dense_replace", 0) for layer in range(num_layers))
    if not any(sparse):
        return None
    third = config["model_type"] == "deepseek_v3"
    grouped = third or config.get("topk_method", "greedy") == "group_limited_greedy"
    size = int(config["moe_intermediate_size"])
    return MoeSpec(
        num_experts=int(config["n_routed_experts"]),
        intermediate_size=size,
        top_k=int(config["num_experts_per_tok"]),
        sparse=sparse,
        scoring="sigmoid" if third else "softmax",
        renormalise=third and bool(config.get("norm_topk_prob", True)),
        num_groups=int(config.get("n_group", 1)) if grouped else 1,
        top_groups=int(config.get("topk_group", 1)) if grouped else 1,
        group_score="top2" if third else "max",
        scale=float(config.get("routed_scaling_factor", 1.0)),
        score_bias=third,
        shared_size=size * int(config.get("n_shared_experts", 0)),
        names=ExpertNames(shared="shared_experts"),
    )


def _deepseek(config: _Config) -> ModelSpec:
    shape = _shape(config)
    latent = latent_spec(config.values)
    shape |= {"head_dim": latent.rope_dim, "num_kv_heads": 1}
    shape["attention_scale"] = latent_scale(config.values, latent)
    rope = _one_rope(config, [None] * shape["num_layers"], 10000.0)
    return ModelSpec(**shape, **rope, latent=latent, moe=_deepseek_experts(config))


_FAMILIES: Final[Mapping[str, Callable[[_Config], ModelSpec]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
}
