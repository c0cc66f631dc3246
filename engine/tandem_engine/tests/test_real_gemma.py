"""The real Gemma 3 270M against transformers on the same weights."""

from collections.abc import Iterator

import pytest
from transformers import PreTrainedModel

from tandem_engine.config import WorkerConfig
from tandem_engine.load.runner import load_runner
from tandem_engine.startup import Startup
from tandem_engine.step import Runner
from tandem_engine.tests.real_gemma import BOS, MODEL, prompt_of, transformers_gemma
from tandem_engine.tests.step_driver import generate
from tandem_engine.tests.tiny_checkpoints import is_greedy

PAGE = 64


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return transformers_gemma()


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    config = WorkerConfig(model=MODEL, page_size=PAGE, kv_memory_bytes=1 << 30)
    loaded = load_runner(config, Startup())
    yield loaded
    loaded.close()


def test_it_knows_the_three_largest_cities_in_france(runner: Runner) -> None:
    prompt = [BOS, 818, 1806, 7488, 9979, 528, 7001, 659]  # The three largest cities in France are
    paris_lyon_and_marseille = [9079, 236764, 49533, 532, 82706]
    assert generate(runner, [prompt], 5) == [paris_lyon_and_marseille]


def test_a_handful_of_prompts(runner: Runner, reference: PreTrainedModel) -> None:
    prompts = [prompt_of(length, start=3 * length) for length in (1, 7, PAGE, PAGE + 1, 300)]
    found = generate(runner, prompts, 8, chunk=100, stagger=1)
    for prompt, tokens in zip(prompts, found, strict=True):
        assert is_greedy(reference, prompt, tokens), f"prompt of {len(prompt)} tokens"


@pytest.mark.slow
def test_thirty_two_prompts_of_1_to_3000_tokens(runner: Runner, reference: PreTrainedModel) -> None:
    short = [1, 2, 3, 5, 9, 17, 31, 33, 62, 63, 64, 65, 66, 90, 127, 128, 129, 130, 150, 191]
    long = [192, 193, 255, 257, 320, 448, 511, 512, 513, 640, 1025, 3000]
    prompts = [prompt_of(n, start=5 * i) for i, n in enumerate(short + long)]
    found: list[list[int]] = []
    at = 0
    for batch, chunk in ((1, 512), (2, 100), (4, 64), (9, 33), (16, 200)):
        found += generate(runner, prompts[at : at + batch], 16, chunk, stagger=1)
        at += batch
    assert at == len(prompts) == len(found) == 32
    for prompt, tokens in zip(prompts, found, strict=True):
        assert is_greedy(reference, prompt, tokens), f"prompt of {len(prompt)} tokens"
