"""Llama: full attention in every layer, biases where the config asks for them."""

from tandem_engine.spec.families.config_reader import ConfigReader
from tandem_engine.spec.model import ModelSpec


def llama(config: ConfigReader) -> ModelSpec:
    """The spec of a llama model."""
    bias = bool(config.get("attention_bias", False))
    return ModelSpec(
        **config.shape(),
        **config.one_rope([None] * config.num_layers, 10000.0),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )
