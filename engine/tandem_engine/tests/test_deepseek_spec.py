"""The published DeepSeek configurations mean the same here as in transformers."""

import math
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from tandem_engine.models.parameters import build_parameters
from tandem_engine.models.rope import RotaryAngles
from tandem_engine.spec.families import build_spec
from tandem_engine.spec.model import ModelSpec
from tandem_wire.model_config import ModelFacts

_LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


def _yarn(mscale: float) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
    }


V2_LITE: dict[str, Any] = {
    **_LATENT,
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_theta": 10000,
    "rope_scaling": _yarn(0.707),
}
V3: dict[str, Any] = {
    **_LATENT,
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_theta": 10000,
    "rope_scaling": _yarn(1.0),
}


def _spec(config: dict[str, Any]) -> ModelSpec:
    facts = ModelFacts(
        architecture=config["model_type"],
        vocab_size=config["vocab_size"],
        max_position=config["max_position_embeddings"],
        eos_token_ids=(1,),
        config=config,
    )
    return build_spec(facts)


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "model_type"}


@pytest.mark.parametrize(
    ("config", "kind", "model"),
    [
        (V2_LITE, DeepseekV2Config, DeepseekV2ForCausalLM),
        (V3, DeepseekV3Config, DeepseekV3ForCausalLM),
    ],
    ids=["V2-Lite", "V3"],
)
def test_as_many_parameters_as_in_transformers(
    config: dict[str, Any], kind: Any, model: Any
) -> None:
    with torch.device("meta"):
        theirs = model(kind(**_arguments(config)))
    biases = [b for n, b in theirs.named_buffers() if n.endswith("e_score_correction_bias")]
    expected = sum(x.numel() for x in [*theirs.parameters(), *biases])
    ours = sum(math.prod(parameter.shape) for parameter in build_parameters(_spec(config)))
    assert ours == expected
    scaling = theirs.model.layers[0].self_attn.scaling
    assert _spec(config).attention_scale == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize("mscale", [1.0, 0.5])
def test_yarn_turns_as_far_as_in_transformers(mscale: float) -> None:
    scaling = {**_yarn(1.0), "mscale": mscale}
    config = {**V3, "rope_scaling": scaling}
    positions = torch.tensor([0, 1, 7, 1000, 163839])
    rotary = DeepseekV3RotaryEmbedding(DeepseekV3Config(**_arguments(config)))
    expected = rotary(torch.empty(0), positions[None])
    spec = _spec(config)
    angles = RotaryAngles(spec.ropes[0], spec.head_dim, spec.max_position, torch.device("cpu"))
    for ours, theirs in zip(angles.at(positions, torch.float32), expected, strict=True):
        # The position multiplies a rounding error of the frequency.
        torch.testing.assert_close(ours, theirs[0, :, :32], rtol=0, atol=0.02)
        torch.testing.assert_close(ours[:4], theirs[0, :4, :32], rtol=0, atol=2e-4)


def test_routing_of_the_published_models() -> None:
    lite, third = _spec(V2_LITE).moe, _spec(V3).moe
    assert lite is not None
    assert third is not None
    assert (lite.scoring, lite.num_groups, lite.renormalise, lite.scale) == ("softmax", 1, False, 1)
    assert (lite.sparse[:2], lite.shared_size, lite.score_bias) == ((False, True), 2816, False)
    assert (third.scoring, third.group_score, third.scale) == ("sigmoid", "top2", 2.5)
    assert (third.num_groups, third.top_groups, third.renormalise) == (8, 4, True)
    assert (third.sparse[2:4], third.score_bias) == ((False, True), True)
