"""Multi-head latent attention, as data (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem_wire.model_error import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Sizes of the projections; each is per head, except the ranks and the shared key.

    `interleaved`: the rotation's pairs are (2i, 2i + 1) instead of (i, i + rope_dim / 2).
    """

    rank: int
    """Of the latent that keys and values are made from."""
    rope_dim: int
    """Of the rotated part of queries, and of the one key that all heads share."""
    nope_dim: int
    """Of the part of queries and keys that knows no position."""
    value_dim: int
    query_rank: int | None = None
    """Of the latent that queries are made from; None: they are projected at once."""
    interleaved: bool = True
    norm_epsilon: float = 1e-6
    """Of the latents' norms; the config's epsilon is for the others."""

    @property
    def width(self) -> int:
        """Numbers that the cache keeps per token and layer."""
        return self.rank + self.rope_dim

    @property
    def query_dim(self) -> int:
        """Of one head's query."""
        return self.nope_dim + self.rope_dim


def latent_spec(config: Mapping[str, Any]) -> LatentSpec:
    """From a config.json of the families deepseek_v2 and deepseek_v3.

    Raises:
        KeyError: a size is missing.
        UnsupportedModelError: the projections have biases.
    """
    if config.get("attention_bias"):
        raise UnsupportedModelError(
            "latent attention with biases is not there", "use a model without attention_bias"
        )
    rank = config.get("q_lora_rank")
    interleaved = config.get("rope_interleave")
    return LatentSpec(
        rank=int(config["kv_lora_rank"]),
        rope_dim=int(config["qk_rope_head_dim"]),
        nope_dim=int(config["qk_nope_head_dim"]),
        value_dim=int(config["v_head_dim"]),
        query_rank=None if rank is None else int(rank),
        interleaved=True if interleaved is None else bool(interleaved),
    )


def latent_scale(config: Mapping[str, Any], latent: LatentSpec) -> float:
    """Factor on the scores: of the query's size, and of YaRN's temperature where it is in use."""
    scale = float(latent.query_dim**-0.5)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    over_all = float(rope.get("mscale_all_dim") or 0.0)
    if kind != "default" and over_all and float(rope["factor"]) > 1.0:
        scale *= (0.1 * over_all * math.log(float(rope["factor"])) + 1.0) ** 2
    return scale
