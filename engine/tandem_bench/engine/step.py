"""Whole decode and prefill steps of a model's shape beside their floors."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tandem_bench.gpu.device import Ceilings, find_ceilings
from tandem_bench.gpu.lines import Line, LineTable
from tandem_bench.options import json_option, option, parse_pairs
from tandem_bench.shapes import model_uri, named_config, unknown_model
from tandem_bench.terminal import Bars, notes, results
from tandem_engine.startup import Startup, process_start

if TYPE_CHECKING:
    from tandem_bench.kernels.decode_step import Shape

DENSE: Final = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose step is built from kernels alone; those of others run in the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A whole decode step and prefill of a model's shape, random weights, against the floor."""

    model: str = option(
        "llama-8b",
        "llama-8b, qwen2.5-7b, qwen3-0.6b, gemma3-4b, qwen3-moe-30b, deepseek-v2-lite, or a model "
        "URI (for its config).",
    )
    cases: str = option(
        "1x1024,8x1024,32x1024,64x1024,256x1024,32x8192", "BATCHxCONTEXT of the decode steps."
    )
    prefill: bool = option(True, "Also whole prefills.")
    prefill_cases: str = option("1024x8192,8192x8192,32768x8192", "PROMPTxCHUNK of the prefills.")
    variants: bool = option(
        False, "Also without overlap, and with cuBLAS alone (dense models).", name="--variants"
    )
    engine: bool = option(
        False,
        "Run the engine's own steps, host and all; always so for models with experts, latent "
        "attention or windows.",
        name="--engine",
    )
    cuda_graphs: bool = option(True, "Whether the engine's own steps are CUDA graphs.")
    json_file: Path | None = json_option()


def read_config(model: str) -> Mapping[str, Any]:
    """The config of a short name or of a model URI (its weights are not needed).

    Raises:
        WorkloadError: it is neither.
        ModelSourceError: the model isn't there.
    """
    found = named_config(model)
    if found is not None:
        return found
    if "://" not in model:
        raise unknown_model(model)
    from tandem_wire.model_config import read_model_facts
    from tandem_wire.model_source import resolve_model

    return read_model_facts(resolve_model(model, weights=False).path).config


def shape_fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of `decode_step.Shape`, by name; None unless the model is dense."""
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


def decode_lines(
    shape: "Shape", cases: Sequence[tuple[int, int]], ceilings: Ceilings, *, variants: bool = False
) -> Iterator[Line]:
    """Checked first, then every (batch, context)."""
    from tandem_bench.kernels import decode_step

    errors = {
        options: max(decode_step.check_step(options, *case, shape) for case in decode_step.CHECKED)
        for options in (*(decode_step.VARIANTS if variants else ()), decode_step.Options())
    }
    weights = decode_step.Weights(shape)
    for case in cases:
        for options, error in errors.items():
            yield decode_step.step_line(shape, weights, case, options, ceilings, error)


def prefill_lines(
    shape: "Shape", cases: Sequence[tuple[int, int]], ceilings: Ceilings
) -> Iterator[Line]:
    """Checked first, then every (prompt, chunk)."""
    from tandem_bench.kernels import decode_step, prefill_step

    error = prefill_step.check_prefill(shape)
    weights = decode_step.Weights(shape)
    for case in cases:
        yield prefill_step.prefill_line(shape, weights, case, ceilings, error)


def run(options: Options) -> None:
    """Decode steps, then prefills."""
    decodes = parse_pairs(options.cases, "--cases")
    prompts = parse_pairs(options.prefill_cases, "--prefill-cases") if options.prefill else []
    fields = shape_fields(read_config(options.model))
    ceilings = find_ceilings()
    table = LineTable(ceilings)
    if fields is None or options.engine:
        measure_engine(table, options, decodes, prompts, ceilings)
    else:
        from tandem_bench.kernels.decode_step import Shape

        shape = Shape(**fields)
        lines = decode_lines(shape, decodes, ceilings, variants=options.variants)
        table.take(f"decode, {options.model}", lines)
        if prompts:
            table.take(f"prefill, {options.model}", prefill_lines(shape, prompts, ceilings))
    config = {"model": options.model, "engine": options.engine, **(fields or {})}
    table.finish(config, options.json_file)


def measure_engine(
    table: LineTable,
    options: Options,
    decodes: list[tuple[int, int]],
    prompts: list[tuple[int, int]],
    ceilings: Ceilings,
) -> None:
    """Steps of the engine's runner; cases whose KV the GPU has no room for are left out."""
    from tandem_bench.engine.runner_steps import STEPS, EngineSteps, open_runner

    longest = STEPS + 1 + max([context for _, context in decodes] + [size for size, _ in prompts])
    budget = max([chunk for _, chunk in prompts], default=2048)
    most = max(batch for batch, _ in decodes)
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder, Bars() as bars:
        startup = Startup(bars.update, process_start())
        uri = model_uri(options.model, Path(folder))
        graphs = options.cuda_graphs
        runner = open_runner(uri, longest, budget, most, startup, graphs=graphs)
    notes.print(startup.report().describe(), soft_wrap=True)
    steps = EngineSteps(runner, ceilings)
    try:
        fitting = [case for case in decodes if steps.fits(*case)]
        for batch, context in decodes:
            if (batch, context) not in fitting:
                results.print(f"[dim]{batch} x {context}: not enough memory for its KV[/]")
        table.take(f"decode, {options.model}, engine", steps.decode_lines(fitting))
        table.take(f"prefill, {options.model}, engine", steps.prefill_lines(prompts))
    finally:
        runner.close()
