"""Penalties from the table of seen tokens against penalties computed from the items."""

import random
from typing import Any

import pytest
import torch

from tandem_engine.sampling.adjustment import adjust_batch, adjust_logits
from tandem_engine.sampling.sampler import Sampler
from tandem_engine.sampling.seen_tokens import SeenTokens
from tandem_engine.step import BatchItem
from tandem_wire.messages import SamplingParams

VOCAB, EOS = 40, 2


def make_item(rid: str, prompt: list[int], output: list[int], **params: Any) -> BatchItem:
    return BatchItem(
        rid, [1], 0, [0], True, SamplingParams(max_tokens=10, **params), prompt, output
    )


def _params(index: int) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.4},
        {"frequency_penalty": 0.3, "presence_penalty": 0.1},
        {"repetition_penalty": 0.8, "presence_penalty": -0.2, "logit_bias": {3: 2.0, 99: 1.0}},
        {"min_tokens": 5, "stop_token_ids": [6, 77]},
    ]
    return kinds[index % len(kinds)]


def _check(items: list[BatchItem], seen: SeenTokens) -> None:
    logits = torch.randn(len(items), VOCAB)
    expected = logits.clone()
    adjust_logits(expected, items, [EOS])
    found, best = adjust_batch(logits.clone(), items, [EOS], seen)
    assert torch.allclose(found, expected, atol=1e-5)
    assert best.tolist() == found.argmax(-1).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_follows_sequences_that_come_grow_and_go(seed: int) -> None:
    """More sequences than rows, in any order; some are absent for a while, some start anew."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    seen = SeenTokens(VOCAB, torch.device("cpu"))
    alive: dict[str, BatchItem] = {}
    for step in range(40):
        for _ in range(chance.randrange(3)):
            prompt = [chance.randrange(VOCAB + 5) for _ in range(chance.randrange(12))]
            output = [chance.randrange(VOCAB) for _ in range(chance.randrange(4))]
            name = f"{step}-{len(alive)}"
            alive[name] = make_item(name, prompt, output, **_params(len(alive)))
        for name in list(alive):
            if chance.random() < 0.05:
                del alive[name]
            elif chance.random() < 0.03:
                alive[name].output_tokens = []
        items = [item for item in alive.values() if chance.random() < 0.8]
        chance.shuffle(items)
        if items:
            _check(items, seen)
        for item in items:
            item.output_tokens = [*item.output_tokens, chance.randrange(VOCAB)]
    assert seen.table.shape[0] in (8, 16, 32, 64)


def test_rows_are_given_on() -> None:
    seen = SeenTokens(VOCAB, torch.device("cpu"))
    for index in range(30):
        _check([make_item(str(index), [1, 1, 2], [3, 3], repetition_penalty=2.0)], seen)
    assert seen.table.shape[0] == 8


@pytest.mark.gpu
def test_a_gpu_draws_the_cpus_tokens() -> None:
    torch.manual_seed(3)
    sampler = Sampler([EOS])
    logits = torch.randn(10, VOCAB) * 2
    items = [
        make_item(str(i), [1, 5, 5], [7, 7, i], temperature=0.9, top_k=20, seed=i, **_params(i))
        for i in range(10)
    ]
    expected = [found.tokens[0] for found in Sampler([EOS]).sample(logits, items)]
    for _ in range(2):
        found = sampler.sample(logits.cuda(), items)
        assert [one.tokens[0] for one in found] == expected
