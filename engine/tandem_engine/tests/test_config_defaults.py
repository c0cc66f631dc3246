"""Configs as sparse as the hub's mean to Tandem what they mean to transformers."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tandem_engine.spec.families import FAMILIES, build_spec
from tandem_engine.spec.model import ModelSpec
from tandem_wire.config_defaults import CONFIG_DEFAULTS, fill_config
from tandem_wire.model_config import ModelFacts, read_model_facts
from tandem_wire.model_error import BadModelFileError, ModelSourceError, UnsupportedModelError

CLASSES: dict[str, type[Any]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "mixtral": MixtralConfig,
    "qwen2": Qwen2Config,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "gemma3": Gemma3TextConfig,
    "gemma3_text": Gemma3TextConfig,
    "deepseek_v2": DeepseekV2Config,
    "deepseek_v3": DeepseekV3Config,
}
WITHOUT_EFFECT = {field.name for field in dataclasses.fields(PretrainedConfig)} | {
    "attention_dropout",
    "initializer_range",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "rope_parameters",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "use_cache",
    "num_mtp_layers",
}
"""Fields that training, or nothing, reads; ropes are compared in the specs."""


def test_every_family_has_its_defaults() -> None:
    assert CONFIG_DEFAULTS.keys() == FAMILIES.keys() == CLASSES.keys()


@pytest.mark.parametrize("family", CLASSES)
def test_the_defaults_are_those_of_transformers(family: str) -> None:
    fields = {
        field.name: field.default
        for field in dataclasses.fields(CLASSES[family])
        if field.name not in WITHOUT_EFFECT
    }
    assert dict(CONFIG_DEFAULTS[family]) == fields


def spec_of(family: str, config: dict[str, Any]) -> ModelSpec:
    filled = fill_config(family, {"model_type": family, **config})
    return build_spec(
        ModelFacts(family, filled, (), filled["max_position_embeddings"], filled["vocab_size"])
    )


def full(family: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers completes it."""
    whole: dict[str, Any] = CLASSES[family](
        **copy.deepcopy(config)
    ).to_dict()  # it writes into the dicts given
    return whole


NEEDED = {"deepseek_v2": {"num_experts_per_tok": 6}}
"""What transformers itself has no default for."""
STATED: dict[str, st.SearchStrategy[Any]] = {
    "num_hidden_layers": st.integers(1, 40),
    "hidden_size": st.sampled_from([4096, 7680]),
    "num_attention_heads": st.sampled_from([8, 32]),
    "num_key_value_heads": st.sampled_from([4, 8]),
    "head_dim": st.sampled_from([64, 256]),
    "tie_word_embeddings": st.booleans(),
    "sliding_window": st.sampled_from([512, 1024]),
    "use_sliding_window": st.booleans(),
    "max_window_layers": st.integers(0, 40),
    "rms_norm_eps": st.sampled_from([1e-5, 1e-6]),
    "attention_bias": st.booleans(),
    "rope_theta": st.sampled_from([5e5, 1e6]),
    "rope_scaling": st.sampled_from([{"rope_type": "linear", "factor": 8.0}]),
    "max_position_embeddings": st.sampled_from([4096, 131072]),
    "moe_intermediate_size": st.sampled_from([64, 1024]),
    "first_k_dense_replace": st.integers(0, 2),
    "q_lora_rank": st.sampled_from([None, 24]),
    "num_experts": st.sampled_from([16, 32]),
    "norm_topk_prob": st.booleans(),
    "n_group": st.sampled_from([4, 8]),
    "topk_group": st.sampled_from([2, 4]),
    "n_shared_experts": st.integers(1, 3),
    "decoder_sparse_step": st.integers(1, 3),
    "sliding_window_pattern": st.integers(2, 6),
}


@given(data=st.data(), family=st.sampled_from(sorted(CLASSES.keys() - {"gemma3"})))
def test_a_config_with_any_fields_left_out_has_the_spec_of_the_whole(
    data: st.DataObject, family: str
) -> None:
    known = CONFIG_DEFAULTS[family].keys() | {"rope_theta", "rope_scaling", "num_experts"}
    if family == "gemma3_text":
        known |= {"sliding_window_pattern"}
    if family.startswith("deepseek"):
        known -= {"attention_bias", "num_experts"}  # refused; and not a name of V3's
    optional = {name: values for name, values in STATED.items() if name in known}
    sparse = {
        **NEEDED.get(family, {}),
        **data.draw(st.fixed_dictionaries({}, optional=optional)),
    }
    assert spec_of(family, sparse) == spec_of(family, full(family, sparse))


def test_the_text_half_of_gemma_3_4b_as_the_hub_has_it(tmp_path: Path) -> None:
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    whole = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    facts = read_model_facts(tmp_path)
    assert (facts.vocab_size, facts.max_position) == (262208, 131072)
    spec = build_spec(facts)
    assert spec == spec_of("gemma3_text", full("gemma3_text", text))
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 4, 256)


@pytest.mark.parametrize(
    ("family", "stated", "error", "words"),
    [
        ("deepseek_v2", {}, BadModelFileError, "num_experts_per_tok"),
        ("gemma3", {"use_bidirectional_attention": True}, UnsupportedModelError, "bidirectional"),
        ("llama", {"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor"),
    ],
)
def test_what_no_default_covers_is_refused_by_name(
    family: str, stated: dict[str, Any], error: type[ModelSourceError], words: str
) -> None:
    with pytest.raises(error, match=words):
        spec_of(family, stated)
