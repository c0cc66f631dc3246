"""Greedy tokens equal those of transformers in float32 through router, decode and prefill worker.

Every prompt is computed by the prefill worker (`--local-prefill-tokens 0`), in chunks, and its KV
pages move to the decode worker. The reference runs on the same weights in this process.
"""

from __future__ import annotations

import asyncio
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
import torch
from deadlines import patience
from transformers import PreTrainedModel

from tandem_engine.tests.real_gemma import MODEL, prompt_of, transformers_gemma
from tandem_engine.tests.tiny_checkpoints import VOCAB, reference_tokens, save_checkpoint
from tests.process_fleet import Fleet, running_fleet
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_TOKENS = 12
TIE = 1e-4
"""Logits this close are equal as far as float32 goes: the order of a sum decides between them."""

MOONCAKE = pytest.param(
    "Mooncake",
    marks=pytest.mark.skipif(sys.version_info >= (3, 14), reason="mooncake has no wheel"),
)
WAVES = (1, 2, 5, 9, 16)  # prompts that are sent at once; 33 in all


@dataclass(frozen=True)
class Answer:
    """The router's answer to one prompt."""

    prompt: list[int]
    tokens: list[int]
    num_cached: int
    tandem: dict[str, Any]


async def ask(client: httpx.AsyncClient, model: str, prompt: list[int]) -> Answer:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    reply = await client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    (choice,) = found["choices"]
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    assert choice["prompt_token_ids"] == prompt
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Answer(prompt, choice["token_ids"], cached, found["tandem"])


async def ask_in_waves(fleet: Fleet, model: str, prompts: list[list[int]]) -> list[Answer]:
    """Send one wave after the other, each all at once; there is no failover anywhere."""
    answers: list[Answer] = []
    async with httpx.AsyncClient(base_url=fleet.url, timeout=patience(600)) as client:
        for size in WAVES:
            wave = prompts[len(answers) : len(answers) + size]
            answers += await asyncio.gather(*(ask(client, model, prompt) for prompt in wave))
    assert len(answers) == len(prompts)
    return answers


def assert_travelled(answers: list[Answer]) -> None:
    """Every prompt was computed by the prefill worker and its KV came over."""
    for answer in answers:
        facts = answer.tandem
        assert (facts["prefill_worker"], facts["decode_worker"]) == ("p", "d"), facts
        assert facts["kv_bytes"] > 0, facts
        assert facts["failovers"] == 0, facts


@torch.inference_mode()
def assert_greedy(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> int:
    """Each token is transformers' most likely one after those before it; the number of ties.

    By induction that is greedy generation, in one forward pass. Where the answer has another token
    than the reference, their logits must be equal within `TIE`, or it is wrong.
    """
    assert len(tokens) == NUM_TOKENS
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    logits = model(ids, logits_to_keep=len(tokens)).logits[0]
    ties = 0
    for position, token in enumerate(tokens):
        best = int(logits[position].argmax())
        if token != best:
            gap = float(logits[position, best] - logits[position, token])
            assert gap <= TIE, (
                f"prompt of {len(prompt)} tokens: token {position} is {token}, transformers has "
                f"{best}, whose logit is {gap:.6f} higher"
            )
            ties += 1
    return ties


def assert_equal(model: PreTrainedModel, answers: list[Answer]) -> None:
    """All answers are transformers' own; ties may be the exception, not the rule."""
    ties = sum(assert_greedy(model, answer.prompt, answer.tokens) for answer in answers)
    assert ties <= 2, f"{ties} ties: that is no chance"


def assert_nothing_held(fleet: Fleet) -> None:
    """Both ledgers come to rest: no lease, no owned block, no leak."""
    for name in ("p", "d"):

        def is_clean(name: str = name) -> bool:
            state = fleet.state_of(name)
            held = [state["ledger"][kind] for kind in ("leaked", "leased", "owned")]
            return held == [0, 0, 0] and not state["running"] and state["leases"] == 0

        wait_for(f"{name} holds nothing", is_clean)


# --- tiny models ------------------------------------------------------------------------------

# Page size, and tokens between two pushes: several chunks for all but the shortest prompts.
TINY = {
    "llama": (16, 64),
    "llama3": (64, 128),
    "qwen2": (64, 64),
    "qwen3": (16, 32),
    "qwen3_moe": (16, 64),
    "mistral": (16, 64),  # a window of 40 tokens
    "deepseek_v2": (16, 64),  # latents instead of keys and values
    "deepseek_v3": (64, 128),
    "gemma3": (64, 192),  # a window of 24 tokens, every sixth layer without
}


def save_tokenizer(directory: Path) -> None:
    """The router needs a tokenizer, but these prompts are ids, so any tokenizer will do."""
    words = {f"t{number}": number for number in range(VOCAB)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "t0")).save(
        str(directory / "tokenizer.json")
    )


def tiny_prompts(page: int, chunk: int) -> list[list[int]]:
    """33 prompts of 1 to 3,000 tokens at the edges of pages and chunks; 12 share prefixes."""
    draw = random.Random(page * chunk)
    edges = [1, 2, 3, page - 1, page, page + 1, 2 * page, 2 * page + 1]
    edges += [chunk - 1, chunk, chunk + 1, 2 * chunk, 3 * chunk + 1]
    others = [7, 41, 67, 100, 129, 250, 700, 3000]
    prompts = [draw.choices(range(3, VOCAB), k=length) for length in edges + others]
    shared = draw.choices(range(3, VOCAB), k=3 * page + 5)
    for length in (0, 0, 1, 2, 9, page - 5, page, chunk, 40, 200, 333, 500):
        prompts.append(shared + draw.choices(range(3, VOCAB), k=length))
    draw.shuffle(prompts)
    return prompts


@pytest.mark.parametrize("family", TINY)
def test_a_tiny_model_of_each_family(family: str, tmp_path: Path) -> None:
    page, chunk = TINY[family]
    directory = tmp_path / family
    model = save_checkpoint(family, directory)
    save_tokenizer(directory)
    prompts = tiny_prompts(page, chunk)
    flags = ("--page-size", str(page), "--chunk-tokens", str(chunk), "--kv-memory", "64Mi")
    batched = ("--max-batched-tokens", str(2 * chunk), "--cache-dir", str(tmp_path))
    with running_fleet(tmp_path, f"file://{directory}", *flags, *batched) as fleet:
        answers = asyncio.run(ask_in_waves(fleet, family, prompts))
        # Once more with a prefix of every prompt known to both workers.
        again = asyncio.run(ask_in_waves(fleet, family, prompts))
        assert_nothing_held(fleet)
    assert_travelled(answers)
    assert_equal(model, answers)
    assert len({token for answer in answers for token in answer.tokens}) > 20, "degenerate"
    shortest = min(answers, key=lambda answer: len(answer.prompt))
    assert shortest.tokens == reference_tokens(model, shortest.prompt, NUM_TOKENS)
    assert_travelled(again)
    assert_equal(model, again)
    assert all(answer.num_cached > 0 for answer in again if len(answer.prompt) > page)


@pytest.mark.parametrize("transport", ["Nixl", MOONCAKE])
def test_a_tiny_model_over_each_library(transport: str, tmp_path: Path) -> None:
    """Between pools of unequal size."""
    page, chunk = TINY["qwen3"]
    directory = tmp_path / "qwen3"
    model = save_checkpoint("qwen3", directory)
    save_tokenizer(directory)
    flags = ("--page-size", str(page), "--chunk-tokens", str(chunk), "--transfer", transport)
    batched = ("--max-batched-tokens", str(2 * chunk), "--cache-dir", str(tmp_path))
    pools = {"p": ("--kv-memory", "64Mi"), "d": ("--kv-memory", "96Mi")}
    with running_fleet(tmp_path, f"file://{directory}", *flags, *batched, **pools) as fleet:
        sizes = [fleet.state_of(name)["load"]["num_blocks"] for name in ("p", "d")]
        assert sizes[0] < sizes[1], sizes
        answers = asyncio.run(ask_in_waves(fleet, "qwen3", tiny_prompts(page, chunk)))
        assert_nothing_held(fleet)
        moved = fleet.state_of("p")["counters"]
    assert_travelled(answers)
    assert_equal(model, answers)
    name = transport.lower()
    out = moved[f'kv_transfer_bytes_total{{backend="{name}",direction="out"}}']
    assert out == sum(answer.tandem["kv_bytes"] for answer in answers)


# --- the real model ---------------------------------------------------------------------------

PAGE, CHUNK = 64, 256


def gemma_prompts() -> list[list[int]]:
    """33 prompts of 1 to 3,000 tokens of text, long and short mixed; six share 200 tokens."""
    lengths = [1, 2, 3, 5, 9, 17, 31, 33, 62, 63, 64, 65, 66, 90, 127, 128, 129, 150, 191]
    lengths += [192, 193, 255, 256, 257, 448, 512, 3000]
    prompts = [prompt_of(length, start=5 * number) for number, length in enumerate(lengths)]
    shared = prompt_of(200, start=700)
    prompts += [shared + prompt_of(length, start=length)[1:] for length in (2, 3, 57, 58, 59, 300)]
    random.Random(1).shuffle(prompts)
    return prompts


def test_the_real_gemma(tmp_path: Path) -> None:
    model = transformers_gemma()
    prompts = gemma_prompts()
    flags = ("--page-size", str(PAGE), "--chunk-tokens", str(CHUNK), "--kv-memory", "640Mi")
    with running_fleet(tmp_path, MODEL, *flags) as fleet:
        name = MODEL.rpartition("/")[2]
        answers = asyncio.run(ask_in_waves(fleet, name, prompts))
        assert_nothing_held(fleet)
    assert_travelled(answers)
    assert_equal(model, answers)
