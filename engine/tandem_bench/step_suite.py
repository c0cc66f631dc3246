"""Whole decode and prefill steps of a model's shape beside their floors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from tandem_bench.errors import WorkloadError
from tandem_bench.shapes import SHAPES, named_config

if TYPE_CHECKING:
    from tandem_kernels.bench.step import Shape
    from tandem_kernels.bench.timing import Ceilings, Line

DENSE: Final = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose step is built from kernels alone; those of others run in the engine."""


def read_config(model: str) -> Mapping[str, Any]:
    """The config of a short name or of a model URI (its weights are not needed).

    Raises:
        WorkloadError: it is neither.
        ModelSourceError: the model can't be had.
    """
    found = named_config(model)
    if found is not None:
        return found
    if "://" not in model:
        raise WorkloadError(
            f"{model!r} is neither a model URI nor one of {', '.join(SHAPES)}",
            "write hf://ORG/NAME, file:///PATH, package://NAME or one of the short names",
        )
    from tandem_wire.model_config import read_model_facts
    from tandem_wire.model_source import resolve_model

    return read_model_facts(resolve_model(model, weights=False).path).config


def shape_fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of `tandem_kernels.bench.step.Shape`, by name; None unless the model is dense."""
    kind = str(config["model_type"])
    if kind not in DENSE:
        return None
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    return {
        "layers": int(config["num_hidden_layers"]),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "dim": int(config.get("head_dim") or hidden // heads),
        "intermediate": int(config["intermediate_size"]),
        "vocab": int(config["vocab_size"]),
        "qkv_bias": kind == "qwen2" or bool(config.get("attention_bias", False)),
        "qk_norm": kind == "qwen3",
    }


def parse_pairs(text: str) -> list[tuple[int, int]]:
    """`1x1024,32x8192`."""
    try:
        pairs = [tuple(map(int, part.lower().split("x"))) for part in text.split(",")]
        return [(first, second) for first, second in pairs]
    except ValueError:
        raise WorkloadError(
            f"{text!r} is no list of cases", "write BATCHxCONTEXT, such as 1x1024,32x8192"
        ) from None


def decode_lines(
    shape: "Shape", cases: Sequence[tuple[int, int]], ceilings: "Ceilings"
) -> Iterator["Line"]:
    """Checked first, then every (batch, context)."""
    from tandem_kernels.bench import step

    options = step.Options()
    error = max(step.check_step(options, *case, shape) for case in step.CHECKED)
    weights = step.Weights(shape)
    for case in cases:
        yield step.step_line(shape, weights, case, options, ceilings, error)


def prefill_lines(
    shape: "Shape", cases: Sequence[tuple[int, int]], ceilings: "Ceilings"
) -> Iterator["Line"]:
    """Checked first, then every (prompt, chunk)."""
    from tandem_kernels.bench import prefill_step, step

    error = prefill_step.check_prefill(shape)
    weights = step.Weights(shape)
    for case in cases:
        yield prefill_step.prefill_line(shape, weights, case, ceilings, error)
