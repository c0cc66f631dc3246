"""Models by name for benchmarks with random weights: only the shape matters.

`run` writes a folder that workers and routers take for such a model: `config.json` and a tokenizer
of bytes. Workers then need `--format Dummy`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tandem_bench.errors import WorkloadError
from tandem_bench.options import argument

_COMMON: Final[dict[str, Any]] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "llama-8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "gemma3-4b": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 10240,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "qwen3-moe-30b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 102400,
        "max_position_embeddings": 163840,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
}
"""As in the models' own config.json, without scaled positions (Llama, Gemma, DeepSeek).

`gemma3-4b` is the text model alone, `qwen3-moe-30b` is Qwen3-30B-A3B.
"""


def named_config(name: str) -> dict[str, Any] | None:
    """A config.json by short name, or None."""
    found = SHAPES.get(name.lower())
    return None if found is None else {**_COMMON, **found}


def unknown_model(model: str) -> WorkloadError:
    """What to raise for a model that is neither a URI nor a short name."""
    return WorkloadError(
        f"{model!r} is neither a model URI nor one of {', '.join(SHAPES)}",
        "write hf://ORG/NAME, file:///PATH, package://NAME or one of the short names",
    )


def model_uri(model: str, folder: Path) -> str:
    """A model URI as it is; for a short name, that of a folder with its config.json in `folder`.

    Raises:
        WorkloadError: it is neither.
    """
    if "://" in model:
        return model
    config = named_config(model)
    if config is None:
        raise unknown_model(model)
    path = folder / model.lower()
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return f"file://{path.resolve()}"


def write_shape(name: str, folder: Path) -> str:
    """The URI of `folder`/`name`, with config and tokenizer. Raises WorkloadError: unknown name."""
    if name.lower() not in SHAPES:
        raise WorkloadError(
            f"there is no shape called {name!r}", f"choose from {', '.join(SHAPES)}"
        )
    uri = model_uri(name, folder)
    write_tokenizer(Path(uri.removeprefix("file://")), SHAPES[name.lower()]["vocab_size"])
    return uri


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A token for every byte; the ids above those have names that no text contains."""
    vocab = {letter: index for index, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    vocab |= {f"<{index}>": index for index in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Write a folder that is served as a model with random weights, and print its URI.

    Workers need `--format Dummy` with it.
    """

    name: str = argument("A short name, such as llama-8b.")
    folder: Path = argument("Where to make the folder.")


def run(options: Options) -> None:
    """Write one folder; its URI alone goes to standard output."""
    print(write_shape(options.name, options.folder))
