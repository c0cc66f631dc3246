"""DeepSeek V2 and V3: latent attention, and experts past the first layers."""

import math

from tandem_engine.spec.families.config_reader import ConfigReader
from tandem_engine.spec.latent import LatentSpec
from tandem_engine.spec.model import ModelSpec
from tandem_engine.spec.moe import ExpertNames, MoeSpec
from tandem_wire.model_error import UnsupportedModelError


def deepseek(config: ConfigReader) -> ModelSpec:
    """The spec of a deepseek_v2 or deepseek_v3 model.

    Raises:
        UnsupportedModelError: the attention's projections have biases.
    """
    shape = config.shape()
    latent = _latent(config)
    shape |= {"head_dim": latent.rope_dim, "num_kv_heads": 1}
    shape["attention_scale"] = _attention_scale(config, latent)
    rope = config.one_rope([None] * shape["num_layers"], 10000.0)
    return ModelSpec(**shape, **rope, latent=latent, moe=_experts(config))


def _latent(config: ConfigReader) -> LatentSpec:
    if config.get("attention_bias"):
        raise UnsupportedModelError(
            "the model's config: attention_bias is true, which latent attention does not support",
            "use a model without attention_bias",
        )
    rank = config.get("q_lora_rank")
    return LatentSpec(
        rank=int(config["kv_lora_rank"]),
        rope_dim=int(config["qk_rope_head_dim"]),
        nope_dim=int(config["qk_nope_head_dim"]),
        value_dim=int(config["v_head_dim"]),
        query_rank=None if rank is None else int(rank),
        interleaved=bool(config.get("rope_interleave", True)),
    )


def _attention_scale(config: ConfigReader, latent: LatentSpec) -> float:
    """Factor on the scores: from the query's size, and from YaRN's temperature if it is in use."""
    scale = float(latent.query_dim**-0.5)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    over_all = float(rope.get("mscale_all_dim") or 0.0)
    if kind != "default" and over_all and float(rope["factor"]) > 1.0:
        scale *= (0.1 * over_all * math.log(float(rope["factor"])) + 1.0) ** 2
    return scale


def _experts(config: ConfigReader) -> MoeSpec | None:
    """Softmax scores in V2; in V3 sigmoids, a bias for the choice, and groups of experts."""
    first = config.get("first_k_dense_replace", 0)
    sparse = tuple(layer >= first for layer in range(config.num_layers))
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
