"""Reads what the families' config.json files have in common."""

from collections.abc import Mapping
from typing import Any, Final

from tandem_engine.spec.model import Activation, LayerSpec
from tandem_engine.spec.rope import rope_spec
from tandem_wire.model_error import UnsupportedModelError

_ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
_LAYER_TYPES: Final = ("full_attention", "sliding_attention")


class ConfigReader:
    """One config.json, which may leave out any value that is the family's default.

    `values` are the file's own. Reading by key raises KeyError for a value that is missing or null.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def __getitem__(self, key: str) -> Any:
        value = self.values[key]
        if value is None:
            raise KeyError(key)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self["num_hidden_layers"])

    def shape(self, **defaults: Any) -> dict[str, Any]:
        """The fields of `ModelSpec` that every family has; `defaults` are the family's own.

        Raises:
            KeyError: a size is missing.
            UnsupportedModelError: the activation is unknown.
        """
        heads = int(self["num_attention_heads"])
        head_dim = int(self.get("head_dim", defaults.get("head_dim", self["hidden_size"] // heads)))
        name = str(self.get("hidden_activation", self.get("hidden_act", "silu")))
        if name not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"the model's config: activation {name!r} is not supported",
                f"use a model with one of {', '.join(_ACTIVATIONS)}",
            )
        return {
            "family": str(self["model_type"]),
            "num_layers": self.num_layers,
            "hidden_size": int(self["hidden_size"]),
            "intermediate_size": int(self["intermediate_size"]),
            "num_heads": heads,
            "num_kv_heads": int(self.get("num_key_value_heads", heads)),
            "head_dim": head_dim,
            "vocab_size": int(self["vocab_size"]),
            "max_position": int(self["max_position_embeddings"]),
            "norm_epsilon": float(self.get("rms_norm_eps", 1e-6)),
            "attention_scale": head_dim**-0.5,
            "activation": _ACTIVATIONS[name],
            "tied_embeddings": bool(
                self.get("tie_word_embeddings", defaults.get("tie_word_embeddings", False))
            ),
        }

    def windows(self, window: int | None) -> list[int | None]:
        """Each layer's window: all have `window`, or those that `layer_types` calls sliding.

        Raises:
            UnsupportedModelError: a layer type is unknown.
        """
        kinds = self.get("layer_types")
        if kinds is None:
            return [window] * self.num_layers
        if unknown := set(kinds) - set(_LAYER_TYPES):
            raise UnsupportedModelError(
                f"the model's config: layer_types {', '.join(sorted(unknown))} are not supported",
                f"use a model with {' and '.join(_LAYER_TYPES)} layers",
            )
        return [window if kind == "sliding_attention" else None for kind in kinds]

    def one_rope(self, windows: list[int | None], theta: float) -> dict[str, Any]:
        """The fields `layers` and `ropes` of `ModelSpec` where all layers share one rope.

        `theta` is the family's default.
        """
        layers = tuple(LayerSpec(window, 0) for window in windows)
        return {"layers": layers, "ropes": (rope_spec(self.values, None, theta),)}
