"""The model families, and how each reads its config.json. A new one is a module and an entry."""

from collections.abc import Callable, Mapping
from typing import Final

from tandem_engine.spec.families.config_reader import ConfigReader
from tandem_engine.spec.families.deepseek import deepseek
from tandem_engine.spec.families.gemma3 import gemma3
from tandem_engine.spec.families.llama import llama
from tandem_engine.spec.families.mistral import mistral, mixtral
from tandem_engine.spec.families.qwen import qwen2, qwen2_moe, qwen3, qwen3_moe
from tandem_engine.spec.model import ModelSpec
from tandem_wire.model_config import ModelFacts
from tandem_wire.model_error import BadModelFileError, UnsupportedModelError

FAMILIES: Final[Mapping[str, Callable[[ConfigReader], ModelSpec]]] = {
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "gemma3": gemma3,
    "gemma3_text": gemma3,
}
"""By the `model_type` of a config.json."""


def build_spec(facts: ModelFacts) -> ModelSpec:
    """The spec of a model, from its config.

    Raises:
        UnsupportedModelError: Tandem lacks the family, or something that the model makes use of.
        BadModelFileError: the config lacks a field.
    """
    family = facts.architecture
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"the model's config: model_type {family!r} is not supported",
            f"use a model of type {', '.join(sorted(FAMILIES))}",
        )
    if facts.config.get("quantization_config"):
        raise UnsupportedModelError(
            "the model's config: quantization_config is set; quantised safetensors are unsupported",
            "use the model's weights in bfloat16 or float16, or a GGUF file",
        )
    try:
        return FAMILIES[family](ConfigReader(facts.config))
    except KeyError as error:
        raise BadModelFileError(
            f"the model's config: field {error} is missing", "download the model again"
        ) from error
