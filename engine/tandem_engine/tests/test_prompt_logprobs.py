"""Logprobs of prompts: each token once, from a computed prompt, and those of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tandem_engine import metrics
from tandem_engine.config import Device, WorkerConfig
from tandem_engine.load.runner import load_runner
from tandem_engine.scheduler.request import Push
from tandem_engine.scheduler.request import Request as QueuedRequest
from tandem_engine.startup import Startup
from tandem_engine.step import Batch, Runner, SampledTokens, ScoredRows
from tandem_engine.tests.fleet import Fleet, assert_clean, prompt
from tandem_engine.tests.step_driver import Blocks, Request
from tandem_engine.tests.test_model_equality import PAGE, make_prompt, open_runner
from tandem_engine.tests.test_tensor_parallel import opened
from tandem_engine.tests.tiny_checkpoints import FAMILIES, save_checkpoint
from tandem_wire.messages import SamplingParams, TokenLogprobs


def scores_of(fleet: Fleet, rid: str, name: str = "d") -> list[TokenLogprobs]:
    items = fleet[name].streams[rid].items
    first = next(number for number, item in enumerate(items) if item.tokens)
    assert all(item.prompt_logprobs is None for item in items[first:])
    return [found for item in items[:first] for found in item.prompt_logprobs or ()]


def expected(tokens: list[int]) -> list[float]:
    """What the mock says of a prompt."""
    return [-token / 64 - 1.0 for token in tokens[1:]]


SCORED: dict[str, Any] = {"max_tokens": 4, "prompt_logprobs": 2}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("length", [1, 2, 8, 63, 64, 65, 200])
def test_chunks_score_each_token_once(length: int, late: bool) -> None:
    fleet = Fleet("d", late=late)
    tokens = prompt(length)
    fleet["d"].submit("r", tokens, params=SCORED)
    fleet["d"].submit("other", prompt(90, start=5))
    fleet.settle()
    found = scores_of(fleet, "r")
    assert [score.logprob for score in found] == expected(tokens)
    assert all(score.top_ids == [0, 1] for score in found)
    assert len(fleet["d"].streams["r"].tokens) == 4
    assert scores_of(fleet, "other") == []
    assert_clean(fleet)


def test_a_cached_prefix_is_computed_again() -> None:
    fleet = Fleet("d")
    tokens = prompt(100)
    for rid in ("first", "second"):
        fleet["d"].submit(rid, tokens, params=SCORED)
        fleet.settle()
        assert [score.logprob for score in scores_of(fleet, rid)] == expected(tokens)
    fleet["d"].submit("plain", tokens)
    fleet.settle()
    streams = fleet["d"].streams
    assert next(item for item in streams["second"].items if item.tokens).num_cached_tokens == 0
    assert streams["plain"].items[0].num_cached_tokens == 99
    assert_clean(fleet)


def test_a_prompt_that_is_scored_stays_with_the_decode_worker() -> None:
    fleet = Fleet("p", "d")
    tokens = prompt(100)
    fleet["d"].submit("r", tokens, peers=("p",), params=SCORED)
    fleet["d"].submit("plain", prompt(100, start=3), peers=("p",))
    fleet.settle()
    assert [score.logprob for score in scores_of(fleet, "r")] == expected(tokens)
    first = next(item for item in fleet["d"].streams["r"].items if item.tokens)
    assert (first.prefill_worker, first.kv_bytes) == ("", 0)
    assert fleet["d"].streams["plain"].items[0].prefill_worker == "p"
    assert_clean(fleet)


def test_preemption_scores_nothing_twice() -> None:
    fleet = Fleet("d", model="mock://tiny?blocks=24&max_len=1024", max_batched_tokens=16)
    low = prompt(120)
    fleet["d"].submit("low", low, params=SCORED)
    for _ in range(7):  # the last chunk is left, so there is room in a step
        fleet.step()
    partial = sum(len(item.prompt_logprobs or ()) for item in fleet["d"].streams["low"].items)
    assert 0 < partial < len(low) - 1
    fleet["d"].submit("high", prompt(120, start=9), priority=5)
    fleet.settle()
    assert fleet["d"].core.scheduler.meter.counters[metrics.PREEMPTIONS] > 0
    assert [score.logprob for score in scores_of(fleet, "low")] == expected(low)
    assert_clean(fleet)


def test_nobody_asks_and_nothing_is_scored() -> None:
    fleet = Fleet("d")
    batches: list[Batch] = []
    launch = fleet["d"].runner.launch

    def spy(batch: Batch) -> Any:
        batches.append(batch)
        return launch(batch)

    fleet["d"].runner.launch = spy  # type: ignore[method-assign]
    fleet["d"].submit("r", prompt(100), params={"logprobs": 2})
    fleet.settle()
    assert batches
    assert not any(batch.scored for batch in batches)


def test_a_prefill_worker_scores_nothing() -> None:
    for push in (None, Push(0)):
        request = QueuedRequest(
            "r",
            tokens=[1, 2, 3],
            num_prompt_tokens=3,
            params=SamplingParams(max_tokens=1, prompt_logprobs=1),
            salt=0,
            arrival=0,
            arrival_time=0.0,
            push=push,
        )
        assert request.wants_scores == (push is None)


def test_a_negative_number_is_refused() -> None:
    fleet = Fleet("d")
    fleet["d"].submit("r", prompt(9), params={"prompt_logprobs": -1})
    fleet.settle()
    assert fleet["d"].streams["r"].refused == ["invalid"]


@torch.inference_mode()
def assert_same(model: PreTrainedModel, tokens: list[int], found: list[TokenLogprobs]) -> None:
    """Values are those of transformers in float32."""
    logits = model(torch.tensor([tokens])).logits[0].float()
    reference = logits.log_softmax(-1)[:-1]
    assert len(found) == len(tokens) - 1
    if not found:
        return
    own = reference.gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
    torch.testing.assert_close(
        torch.tensor([score.logprob for score in found]), own, atol=2e-4, rtol=1e-4
    )
    top = reference.topk(3, dim=-1).values
    values = torch.tensor([score.top_logprobs for score in found])
    torch.testing.assert_close(values, top, atol=2e-4, rtol=1e-4)
    by_id = reference.gather(1, torch.tensor([score.top_ids for score in found]))
    torch.testing.assert_close(by_id, values, atol=2e-4, rtol=1e-4)


def run_scored(runner: Runner, prompts: list[list[int]], chunk: int) -> list[list[TokenLogprobs]]:
    """Prompts in chunks of one batch, the first beside two tokens of a decode."""
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=3)
    blocks = Blocks(runner, PAGE)
    requests = [Request(tokens, blocks.take(len(tokens) + 4), params) for tokens in prompts]
    found: list[list[TokenLogprobs]] = [[] for _ in requests]
    while live := [request for request in requests if len(request.outputs) < 2]:
        items = [request.next_item(chunk) for request in live]
        scored = []
        for place, (request, item) in enumerate(zip(live, items, strict=True)):
            end = min(item.end, len(request.prompt) - 1) - item.start
            scored += [ScoredRows(place, 0, end)] if end > 0 else []
        results = runner.execute(Batch(items, scored=scored))
        for request, item, result in zip(live, items, results, strict=True):
            request.num_computed = item.end
            take(request, result, found[requests.index(request)])
    return found


def take(request: Request, result: SampledTokens | None, scores: list[TokenLogprobs]) -> None:
    if result is not None:
        scores += result.prompt_logprobs or ()
        request.outputs += result.tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_transformers(family: str, tmp_path: Path, device: Device) -> None:
    model = save_checkpoint(family, tmp_path)
    prompts = [make_prompt(length) for length in (1, 2, PAGE, 41, 130)]
    runner = open_runner(tmp_path, device)
    for chunk in (1 << 30, 33, 1):
        for tokens, found in zip(prompts, run_scored(runner, prompts, chunk), strict=True):
            assert_same(model, tokens, found)
    runner.close()


def test_a_worker_scores_as_transformers_does(tmp_path: Path) -> None:
    model = save_checkpoint("llama", tmp_path)

    def load(config: WorkerConfig) -> Runner:
        return load_runner(config, Startup())

    fleet = Fleet(
        "d",
        model=f"file://{tmp_path}",
        device="cpu",
        dtype="Float32",
        kv_memory_bytes=32 << 20,
        cache_dir=str(tmp_path / "cache"),
        open_runner=load,
    )
    tokens = make_prompt(150)
    fleet["d"].submit("r", tokens, params={"max_tokens": 1, "prompt_logprobs": 3})
    fleet["d"].submit("beside", make_prompt(70))
    fleet.settle()
    assert_same(model, tokens, scores_of(fleet, "r"))


def test_two_ranks_score_as_transformers_does(tmp_path: Path) -> None:
    model = save_checkpoint("llama", tmp_path)
    prompts = [make_prompt(length) for length in (2, 41, 130)]
    with opened(tmp_path, 2) as runner:
        for tokens, found in zip(prompts, run_scored(runner, prompts, 33), strict=True):
            assert_same(model, tokens, found)
