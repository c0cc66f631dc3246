"""Writes a transformers model as GGUF, as llama.cpp's converter does."""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from tandem_engine.weights.gguf_names import ROPE_FACTORS

_ARCHITECTURES = {"gemma3_text": "gemma3"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, gemma: bool) -> str:
    """llama.cpp's name for a name of transformers."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    post = "post_attention_norm" if gemma else "ffn_norm"
    return f"blk.{layer}.{ {**_INNER, 'post_attention_layernorm': post}[inner] }.{kind}"


def _pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's `permute`: halves of each head's rows become neighbours."""
    rows = weight.shape[0] // num_heads
    halves = weight.reshape(num_heads, 2, rows // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    rope_factors: list[float] | None = None,
    skip: str = "",
    extra: str = "",
    split: int = 0,
) -> None:
    """Write `model`. Matrices are quantised where their rows allow.

    `skip` names a tensor to leave out; `extra` adds one that no model has. With `split` there are
    files like NAME-00001-of-00003.gguf, each with at most this many tensors.
    """
    config = model.config
    gemma = config.model_type == "gemma3_text"
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    ropes = config.rope_parameters
    writer.add_rope_freq_base(ropes.get("full_attention", ropes)["rope_theta"])
    if ropes.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(ropes["factor"])
        writer.add_rope_scaling_orig_ctx_len(ropes["original_max_position_embeddings"])
        if "beta_fast" in ropes:
            writer.add_rope_scaling_yarn_beta_fast(ropes["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(ropes["beta_slow"])
    if gemma:
        writer.add_sliding_window(config.sliding_window)
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, value in state.items():
        ours = gguf_name(name, gemma)
        if ours == skip:
            continue
        if config.model_type == "llama" and ".q_proj." in name:
            value = _pairs(value, config.num_attention_heads)
        if config.model_type == "llama" and ".k_proj." in name:
            value = _pairs(value, config.num_key_value_heads)
        if gemma and "norm" in name:
            value = value + 1
        block, _ = gguf.GGML_QUANT_SIZES[quantisation]
        if value.ndim == 2 and value.shape[1] % block == 0:
            data = gguf.quants.quantize(np.ascontiguousarray(value), quantisation)
            writer.add_tensor(ours, data, raw_dtype=quantisation)
        else:
            writer.add_tensor(ours, np.ascontiguousarray(value, np.float32))
    if rope_factors is not None:
        writer.add_tensor(ROPE_FACTORS, np.array(rope_factors, np.float32))
    if extra:
        writer.add_tensor(extra, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def round_like(model: PreTrainedModel, quantisation: gguf.GGMLQuantizationType) -> None:
    """Round the values of `model`, in place, as a quantisation does."""
    block, _ = gguf.GGML_QUANT_SIZES[quantisation]
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 2 and value.shape[1] % block == 0:
                rows = value.detach().numpy()
                data = gguf.quants.dequantize(
                    gguf.quants.quantize(rows, quantisation), quantisation
                )
                value.copy_(torch.from_numpy(data.reshape(value.shape)))
