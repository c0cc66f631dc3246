"""Drives a runner the way a scheduler would: chunks, decodes and arrivals mixed in one batch."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem_engine.step import Batch, BatchItem, Runner
from tandem_wire.messages import SamplingParams

GREEDY = SamplingParams(max_tokens=1 << 30, temperature=0.0)


@dataclass
class Request:
    """A prompt on its way."""

    prompt: list[int]
    blocks: list[int]
    params: SamplingParams = GREEDY
    num_computed: int = 0
    outputs: list[int] = field(default_factory=list)

    def next_item(self, chunk: int) -> BatchItem:
        tokens = [*self.prompt, *self.outputs][self.num_computed : self.num_computed + chunk]
        end = self.num_computed + len(tokens)
        return BatchItem(
            rid=str(id(self)),
            tokens=tokens,
            start=self.num_computed,
            block_table=self.blocks,
            sample=end == len(self.prompt) + len(self.outputs),
            params=self.params,
            prompt_tokens=self.prompt,
            output_tokens=list(self.outputs),
        )


class Blocks:
    """Blocks of a runner in random order, so that tables are never contiguous by luck."""

    def __init__(self, runner: Runner, page_size: int, seed: int = 0) -> None:
        self.page_size = page_size
        self.free = list(range(runner.num_blocks))
        random.Random(seed).shuffle(self.free)

    def take(self, num_tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-num_tokens // self.page_size))]


def run_sequences(
    runner: Runner, sequences: Sequence[Request], num_tokens: int, chunk: int, stagger: int = 0
) -> list[list[int]]:
    """Greedy tokens of each; sequence i joins at step i · stagger."""
    step = 0
    while any(len(sequence.outputs) < num_tokens for sequence in sequences):
        live = [
            sequence
            for number, sequence in enumerate(sequences)
            if step >= number * stagger and len(sequence.outputs) < num_tokens
        ]
        items = [sequence.next_item(chunk) for sequence in live]
        results = runner.execute(Batch(items))
        for sequence, item, result in zip(live, items, results, strict=True):
            sequence.num_computed = item.end
            assert (result is not None) == item.sample
            if result is not None:
                sequence.num_computed += len(result.tokens) - 1
                sequence.outputs += result.tokens
        step += 1
    return [sequence.outputs for sequence in sequences]


def generate(
    runner: Runner,
    prompts: Sequence[list[int]],
    num_tokens: int,
    chunk: int = 1 << 30,
    stagger: int = 0,
) -> list[list[int]]:
    """Greedy tokens for all prompts in one continuous batch."""
    blocks = Blocks(runner, runner.kv.layout.page_size)
    sequences = [Request(p, blocks.take(len(p) + num_tokens)) for p in prompts]
    return run_sequences(runner, sequences, num_tokens, chunk, stagger)


def move_prompt(prefill: Runner, decode: Runner, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of a prompt whose pages another runner computed; layers move in two parts."""
    page, layers = prefill.kv.layout.page_size, prefill.kv.layout.num_layers
    source = Request(prompt, Blocks(prefill, page, seed=1).take(len(prompt)))
    first = run_sequences(prefill, [source], 1, chunk=32)[0]
    target = Request(prompt, Blocks(decode, page, seed=2).take(len(prompt) + num_tokens))
    destination = target.blocks[: len(source.blocks)]
    for part in (range(layers - 1), range(layers - 1, layers)):
        packed = prefill.kv.export_blocks(source.blocks, part)
        decode.kv.import_blocks(destination, part, memoryview(packed))
        assert decode.kv.export_blocks(destination, part) == packed
    target.outputs, target.num_computed = list(first), len(prompt)
    return run_sequences(decode, [target], num_tokens, chunk=32)[0]
