"""Gemma 3: layers with a window and a rope of their own between layers that see everything."""

from tandem_engine.spec.families.config_reader import ConfigReader
from tandem_engine.spec.model import LayerSpec, ModelSpec
from tandem_engine.spec.rope import rope_spec
from tandem_wire.model_error import UnsupportedModelError


def gemma3(config: ConfigReader) -> ModelSpec:
    """The spec of a gemma3 model's text half, or of a gemma3_text model.

    Raises:
        UnsupportedModelError: the model's tokens attend to later ones.
    """
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModelError(
            "the model's config: use_bidirectional_attention is true, but Tandem generates text",
            "use a model whose attention is causal",
        )
    shape = config.shape(head_dim=256, tie_word_embeddings=True)
    shape["attention_scale"] = float(config.get("query_pre_attn_scalar", 256)) ** -0.5
    bias = bool(config.get("attention_bias", False))
    return ModelSpec(
        **shape,
        layers=tuple(LayerSpec(window, 0 if window is None else 1) for window in _windows(config)),
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
        attention_softcap=config.get("attn_logit_softcapping"),
        logit_softcap=config.get("final_logit_softcapping"),
    )


def _windows(config: ConfigReader) -> list[int | None]:
    """From `layer_types`, or every layer but each `sliding_window_pattern`-th has the window."""
    window = int(config.get("sliding_window", 4096))
    if config.get("layer_types") is not None:
        return config.windows(window)
    pattern = int(config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6)))
    return [None if (layer + 1) % pattern == 0 else window for layer in range(config.num_layers)]
