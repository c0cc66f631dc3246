"""Qwen 2 and 3, dense and with experts."""

from typing import Any

from tandem_engine.spec.families.config_reader import ConfigReader
from tandem_engine.spec.model import ModelSpec
from tandem_engine.spec.moe import MoeSpec


def qwen2(config: ConfigReader) -> ModelSpec:
    """The spec of a qwen2 model."""
    rope = config.one_rope(_windows(config), 10000.0)
    return ModelSpec(**config.shape(), **rope, qkv_bias=True)


def qwen3(config: ConfigReader) -> ModelSpec:
    """The spec of a qwen3 model."""
    bias = bool(config.get("attention_bias", False))
    rope = config.one_rope(_windows(config), 10000.0)
    shape = config.shape(head_dim=128)
    return ModelSpec(**shape, **rope, qk_norm=True, qkv_bias=bias, output_bias=bias)


def qwen2_moe(config: ConfigReader) -> ModelSpec:
    """The spec of a qwen2_moe model."""
    moe = _experts(
        config,
        top_k=4,
        shared_size=int(config["shared_expert_intermediate_size"]),
        shared_gate=True,
    )
    windows = _windows(config)
    if config.get("layer_types") is None:
        # Without a list, every second layer below `max_window_layers` has the window.
        last = int(config.get("max_window_layers", 28))
        window = config.get("sliding_window")
        switched = bool(config.get("use_sliding_window", False))
        windows = [
            window if switched and layer % 2 == 0 and layer < last else None
            for layer in range(len(windows))
        ]
    rope = config.one_rope(windows, 10000.0)
    bias = bool(config.get("qkv_bias", True))
    return ModelSpec(**config.shape(), **rope, qkv_bias=bias, moe=moe)


def qwen3_moe(config: ConfigReader) -> ModelSpec:
    """The spec of a qwen3_moe model."""
    bias = bool(config.get("attention_bias", False))
    # Unlike in Qwen3, a window that is switched on applies to every layer.
    window = config.get("sliding_window")
    windows = [window if config.get("use_sliding_window", False) else None]
    rope = config.one_rope(windows * config.num_layers, 10000.0)
    moe = _experts(config, top_k=8)
    shape = config.shape()
    return ModelSpec(**shape, **rope, qk_norm=True, qkv_bias=bias, output_bias=bias, moe=moe)


def _windows(config: ConfigReader) -> list[int | None]:
    """Qwen's config carries a window that is off unless `use_sliding_window` is set."""
    if not config.get("use_sliding_window", False):
        return [None] * config.num_layers
    window = config.get("sliding_window")
    if config.get("layer_types") is not None:
        return config.windows(window)
    first = int(config.get("max_window_layers", 28))
    return [window if layer >= first else None for layer in range(config.num_layers)]


def _experts(config: ConfigReader, top_k: int, **shared: Any) -> MoeSpec | None:
    """Experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` doesn't name."""
    count = int(config.get("num_experts", config.get("num_local_experts", 0)))
    step = int(config.get("decoder_sparse_step", 1))
    dense = set(config.get("mlp_only_layers", []))
    sparse = tuple(
        count > 0 and layer not in dense and (layer + 1) % step == 0
        for layer in range(config.num_layers)
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
