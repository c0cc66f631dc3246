"""Small random models of every family, made and written by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 199
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _gemma3(**extra: Any) -> PreTrainedModel:
    shape = {**_SHAPE, "num_hidden_layers": 7, "head_dim": 12, "sliding_window": 24}
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape, query_pre_attn_scalar=10, **extra))


def _llama3() -> PreTrainedModel:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**_SHAPE, rope_parameters=rope, tie_word_embeddings=True))


def _gemma3_linear() -> PreTrainedModel:
    full = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    local = {"rope_type": "default", "rope_theta": 1e4}
    return _gemma3(rope_parameters={"full_attention": full, "sliding_attention": local})


_EIGHT_HEADS: dict[str, Any] = {"num_attention_heads": 8, "head_dim": 8}
"""Heads that four ranks can share; each of the two KV heads is on two ranks."""
_EXPERTS: dict[str, Any] = {"num_experts": 7, "moe_intermediate_size": 24}


def _mixtral(**extra: Any) -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**_SHAPE, num_local_experts=5, **extra))


def _qwen2_moe() -> PreTrainedModel:
    config = Qwen2MoeConfig(
        **_SHAPE, **_EXPERTS, num_experts_per_tok=2, shared_expert_intermediate_size=40
    )
    return Qwen2MoeForCausalLM(config)


def _qwen3_moe(**extra: Any) -> PreTrainedModel:
    shape = {**_SHAPE, **_EXPERTS, "head_dim": 16, "num_experts_per_tok": 3, **extra}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))


_LATENT: dict[str, Any] = {
    **_SHAPE,
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.8,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 64,
}


def _llama_dynamic() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
    shape = {**_SHAPE, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope))


def _qwen2_yarn() -> PreTrainedModel:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return Qwen2ForCausalLM(Qwen2Config(**_SHAPE, rope_parameters=rope))


def _deepseek_v2(**extra: Any) -> PreTrainedModel:
    return DeepseekV2ForCausalLM(DeepseekV2Config(**{**_LATENT, **extra}))


def _deepseek_v3(**extra: Any) -> PreTrainedModel:
    shape = {**_LATENT, "q_lora_rank": 20, "n_group": 4, "topk_group": 2, **extra}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**shape))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True)),
    "llama3": _llama3,
    "llama_dynamic": _llama_dynamic,
    "llama_eight": lambda: LlamaForCausalLM(LlamaConfig(**{**_SHAPE, **_EIGHT_HEADS})),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, head_dim=16, sliding_window=40)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE)),
    "qwen2_window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    ),
    "qwen2_yarn": _qwen2_yarn,
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=16)),
    "mixtral": _mixtral,
    "mixtral_window": lambda: _mixtral(sliding_window=24),
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": lambda: _qwen3_moe(norm_topk_prob=True),
    "qwen3_moe_eight": lambda: _qwen3_moe(**_EIGHT_HEADS),
    "qwen3_moe_some": lambda: _qwen3_moe(decoder_sparse_step=2),
    "qwen3_moe_dense_first": lambda: _qwen3_moe(mlp_only_layers=[0]),
    "deepseek_v2": lambda: _deepseek_v2(q_lora_rank=None, first_k_dense_replace=1),
    "deepseek_v2_groups": lambda: _deepseek_v2(
        q_lora_rank=20,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.0,
    ),
    "deepseek_v3": lambda: _deepseek_v3(rope_parameters=_YARN, first_k_dense_replace=1),
    "deepseek_v3_halves": lambda: _deepseek_v3(
        rope_interleave=False, first_k_dense_replace=2, norm_topk_prob=False
    ),
    "deepseek_v3_dense": lambda: _deepseek_v3(q_lora_rank=None, first_k_dense_replace=3),
    "gemma3": _gemma3,
    "gemma3_linear": _gemma3_linear,
}


def make_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model whose every parameter, norms and biases included, is random."""
    model = FAMILIES[family]().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.3 * noise)
            elif "embed_tokens" in name:
                # Small, or a tied head would answer every token with itself.
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(0.3 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def save_checkpoint(family: str, directory: Path, shard: str = "1GB") -> PreTrainedModel:
    """Make a model, write it to `directory`, and return it."""
    model = make_model(family)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def reference_tokens(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of transformers, which never ends early here."""
    model.generation_config.eos_token_id = None
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return [int(token) for token in found[0, len(prompt) :]]


@torch.inference_mode()
def is_greedy(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> bool:
    """Whether each token is transformers' most likely one after the prompt and those before it.

    By induction that makes them the greedy generation, in one forward pass.
    """
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    logits = model(ids, logits_to_keep=len(tokens)).logits[0]
    best: list[int] = logits.argmax(-1).tolist()
    return best == tokens
