"""What a model is, read from its own files: `config.json`, or the metadata of a GGUF file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tandem_wire.config_defaults import CONFIG_DEFAULTS, fill_config
from tandem_wire.gguf_file import GgufError, GgufFile, read_gguf
from tandem_wire.model_error import BadModelFileError, UnsupportedModelError
from tandem_wire.special_tokens import (
    SpecialTokens,
    gguf_end_tokens,
    gguf_special_tokens,
    read_json_object,
    read_special_tokens,
)

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
_GGUF_YARN_FIELDS: Final = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_GEMMA3_27B_LAYERS: Final = 62


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What router and worker need to know about a model before they load it.

    `config` is in the form of transformers' config.json whatever the file format; of a multimodal
    model it is the text part, and what the file leaves out is filled in as transformers does.
    `eos_token_ids` end a generation, whichever of the model's files names them. Token ids of a
    prompt are below `vocab_size`, the number of the model's embeddings.
    """

    architecture: str
    config: Mapping[str, Any]
    eos_token_ids: tuple[int, ...]
    max_position: int
    vocab_size: int
    special_tokens: SpecialTokens = field(default_factory=lambda: SpecialTokens({}, {}))


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


def _facts_of_directory(path: Path) -> ModelFacts:
    if not (path / "config.json").exists():
        raise BadModelFileError(
            f"{path} has no config.json",
            "name a folder in the Hugging Face form, or a .gguf",
        )
    whole = read_json_object(path / "config.json")
    config = _text_half(whole)
    generation = path / "generation_config.json"
    stated = [config, whole, read_json_object(generation) if generation.exists() else {}]
    bos, eos = (
        [token for part in stated for token in _token_ids(part.get(f"{name}_token_id"))]
        for name in ("bos", "eos")
    )
    special = read_special_tokens(
        path,
        {"bos_token": bos[0] if bos else None, "eos_token": eos[0] if eos else None},
    )
    if "eos_token" in special.ids:
        eos.append(special.ids["eos_token"])
    if not eos and not any("eos_token_id" in part for part in stated):
        defaults = CONFIG_DEFAULTS.get(str(config.get("model_type")), {})
        eos = _token_ids(defaults.get("eos_token_id"))
    return _build_facts(config, eos, special, str(path / "config.json"))


def _text_half(whole: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text half of a multimodal model, or of the whole of another, filled in."""
    text = whole.get("text_config") or {}
    model_type = str(text.get("model_type", whole.get("model_type", "")))
    # What the half leaves out is its class's default, whatever the whole says; only whether the
    # embeddings are tied is a matter of the whole.
    its_own = CONFIG_DEFAULTS.get(model_type, {}).keys() - {"tie_word_embeddings"} if text else ()
    outer = {name: value for name, value in whole.items() if name not in its_own}
    return fill_config(model_type, {**outer, **text})


def _token_ids(value: object) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [int(item) for item in value] if isinstance(value, list) else []


def _build_facts(
    config: Mapping[str, Any], eos: list[int], special: SpecialTokens, origin: str
) -> ModelFacts:
    for needed in ("model_type", "vocab_size", "max_position_embeddings"):
        if config.get(needed) is None:
            raise BadModelFileError(f"{origin} lacks {needed!r}", "use a complete model")
    return ModelFacts(
        architecture=str(config["model_type"]),
        config=config,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        max_position=int(config["max_position_embeddings"]),
        vocab_size=int(config["vocab_size"]),
        special_tokens=special,
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
    for key, name in _GGUF_FIELDS.items():
        value = file.number(f"{architecture}.{key}")
        if value is not None:
            config[name] = value
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        if name not in config:
            raise BadModelFileError(f"{file.path} lacks {name!r}", "use a complete GGUF file")
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
    special = gguf_special_tokens(file)
    return _build_facts(config, gguf_end_tokens(file), special, str(file.path))


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
    prefix = f"{architecture}.rope.scaling"
    kind = file.text(f"{prefix}.type", "none")
    factor = file.number(f"{prefix}.factor") or 1.0
    if kind == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        config["rope_scaling"] = _gguf_yarn(file, prefix, factor)
    elif kind != "none":
        raise UnsupportedModelError(
            f"{file.path} scales its positions by {kind!r}",
            "use a model with yarn, linear or no scaling",
        )


def _gguf_yarn(file: GgufFile, prefix: str, factor: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    for key, name in _GGUF_YARN_FIELDS.items():
        value = file.number(f"{prefix}.{key}")
        if value is not None:
            scaling[name] = value
    scale = file.number(f"{prefix}.yarn_attn_factor") or file.number(f"{prefix}.attn_factor")
    if scale is not None and factor > 1:
        # GGUF's is a factor on yarn's own amplitude, that of a config.json stands in its place.
        scaling["attention_factor"] = scale * (0.1 * math.log(factor) + 1.0)
    return scaling
