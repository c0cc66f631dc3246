"""What a model is, read from its own files: `config.json`, or the metadata of a GGUF file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tandem_wire.gguf_file import GgufError, GgufFile, read_gguf
from tandem_wire.model_error import BadModelFileError, UnsupportedModelError

_GGUF_MODEL_TYPES: Final = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}
"""GGUF's `general.architecture` → the `model_type` of transformers' config.json."""

_GGUF_FIELDS: Final = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
_GEMMA3_27B_LAYERS: Final = 62


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What router and worker need to know about a model before they load it.

    `config` is in the form of transformers' config.json whatever the file format; of a multimodal
    model it is the text part. `eos_token_ids` end a generation.
    """

    architecture: str
    config: Mapping[str, Any]
    eos_token_ids: tuple[int, ...]
    max_position: int
    vocab_size: int


def read_model_facts(path: Path) -> ModelFacts:
    """Facts of a model directory (config.json) or a .gguf file.

    Raises:
        BadModelFileError: the file is damaged or a needed field is missing.
        UnsupportedModelError: a GGUF architecture that Tandem has no model for.
    """
    if path.is_dir():
        return _facts_of_directory(path)
    try:
        return facts_of_gguf(read_gguf(path))
    except (GgufError, OSError) as error:
        raise BadModelFileError(str(error), "download the file again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise BadModelFileError(
            f"can't read {path}: {error}", "download the model again"
        ) from error
    if not isinstance(content, dict):
        raise BadModelFileError(f"{path} is not a JSON object", "download the model again")
    return content


def _facts_of_directory(path: Path) -> ModelFacts:
    if not (path / "config.json").exists():
        raise BadModelFileError(
            f"{path} has no config.json",
            "name a folder in the Hugging Face form, or a .gguf",
        )
    whole = _read_json(path / "config.json")
    config = {**whole, **whole["text_config"]} if "text_config" in whole else whole
    eos = _token_ids(config.get("eos_token_id")) + _token_ids(whole.get("eos_token_id"))
    if (path / "generation_config.json").exists():
        eos += _token_ids(_read_json(path / "generation_config.json").get("eos_token_id"))
    return _build_facts(config, eos, str(path / "config.json"))


def _token_ids(value: object) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [int(item) for item in value] if isinstance(value, list) else []


def _build_facts(config: Mapping[str, Any], eos: list[int], origin: str) -> ModelFacts:
    for field in ("model_type", "vocab_size", "max_position_embeddings"):
        if field not in config:
            raise BadModelFileError(f"{origin} lacks {field!r}", "use a complete model")
    return ModelFacts(
        architecture=str(config["model_type"]),
        config=config,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        max_position=int(config["max_position_embeddings"]),
        vocab_size=int(config["vocab_size"]),
    )


def facts_of_gguf(file: GgufFile) -> ModelFacts:
    """Read the facts from GGUF metadata.

    Raises:
        BadModelFileError: a needed field is missing.
        GgufError: a field is of another type than it should be.
        UnsupportedModelError: Tandem has no model for the architecture.
    """
    architecture = file.text("general.architecture")
    if architecture not in _GGUF_MODEL_TYPES:
        raise UnsupportedModelError(
            f"{file.path} holds a model of architecture {architecture!r}",
            f"use one of {', '.join(_GGUF_MODEL_TYPES)}",
        )
    config: dict[str, Any] = {"model_type": _GGUF_MODEL_TYPES[architecture]}
    for key, field in _GGUF_FIELDS.items():
        value = file.number(f"{architecture}.{key}")
        if value is not None:
            config[field] = value
    for field in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        if field not in config:
            raise BadModelFileError(f"{file.path} lacks {field!r}", "use a complete GGUF file")
    names = {tensor.name for tensor in file.tensors}
    embedding = next((t for t in file.tensors if t.name == "token_embd.weight"), None)
    if embedding is None:
        raise BadModelFileError(f"{file.path} has no token_embd.weight", "use a complete GGUF file")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in names
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config["attention_bias"] = "blk.0.attn_q.bias" in names
    config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    if architecture == "gemma3":
        _add_gemma3_fields(config)
    else:
        config["hidden_act"] = "silu"
    _add_rope_scaling(file, architecture, config)
    eos = [
        token
        for name in ("eos_token_id", "eot_token_id", "eom_token_id")
        if (token := file.integer(f"tokenizer.ggml.{name}")) is not None
    ]
    return _build_facts(config, eos, str(file.path))


def _add_gemma3_fields(config: dict[str, Any]) -> None:
    """Constants of Gemma 3 that its GGUF files leave to the reader (llama.cpp, `gemma3`)."""
    config["hidden_activation"] = "gelu_pytorch_tanh"
    config["rope_local_base_freq"] = 10000.0
    config["sliding_window_pattern"] = 6
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"]
        if config["num_hidden_layers"] == _GEMMA3_27B_LAYERS
        else config["head_dim"]
    )


def _add_rope_scaling(file: GgufFile, architecture: str, config: dict[str, Any]) -> None:
    kind = file.text(f"{architecture}.rope.scaling.type", "none")
    if kind == "linear":
        config["rope_scaling"] = {
            "rope_type": "linear",
            "factor": file.number(f"{architecture}.rope.scaling.factor") or 1.0,
        }
    elif kind != "none":
        raise UnsupportedModelError(
            f"{file.path} scales its positions by {kind!r}", "use a model with linear or no scaling"
        )
