"""GGUF's tensor names in transformers' terms, and how llama.cpp's converter reorders tensors."""

import re
from typing import Final

import torch

_OUTER: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS: Final = {"ffn_norm": "post_attention_layernorm"}
_SANDWICH_NORMS: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

ROPE_FACTORS: Final = "rope_freqs.weight"
"""Llama 3.1's frequency divisors, which the converter writes as a tensor."""


def hugging_face_name(name: str, family: str) -> str:
    """The name that transformers uses; `name` itself if it is unknown."""
    if name in _OUTER:
        return _OUTER[name]
    match = _BLOCK.fullmatch(name)
    norms = _SANDWICH_NORMS if family.startswith("gemma3") else _NORMS
    inner = {**_INNER, **norms}
    if match is None or match[2] not in inner:
        return name
    return f"model.layers.{match[1]}.{inner[match[2]]}.{match[3]}"


def restore_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo the converter's reordering of Llama's Q and K rows.

    The file has each head's rows in the order 0, d/2, 1, d/2 + 1, …, so that neighbours are
    rotated; we rotate halves (llama.cpp, convert_hf_to_gguf.py, `LlamaModel.permute`).
    """
    half = weight.shape[0] // num_heads // 2
    pairs = weight.reshape(num_heads, half, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
