"""A model family's differences, as data: what `decoder.py` reads instead of branching on names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from tandem_engine.models.rope_spec import RopeSpec, rope_spec
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
    """A dense decoder-only transformer.

    `norm_offset` is added to every norm weight of a checkpoint in the Hugging Face form (Gemma
    stores weight - 1). `sandwich_norm`: attention and MLP outputs are normed before they are added.
    `norm_in_float32`: the norm's weight is applied before rounding to the model's dtype (Gemma).
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
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None

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
        embedding_scale=shape["hidden_size"] ** 0.5,
        attention_softcap=config.get("attn_logit_softcapping", None),
        logit_softcap=config.get("final_logit_softcapping", None),
    )


_FAMILIES: Final[Mapping[str, Callable[[_Config], ModelSpec]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
}
