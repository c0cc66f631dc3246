"""`echo` with `logprobs`: a prompt is scored, as evaluation harnesses ask for it."""

from typing import Any

import pytest

from tandem_router.tests.fake_worker import FakeWorker, saying
from tandem_router.tests.harness import Running, router, text_of

PROMPT = "tell me"
SCORES = [None, *(-ord(letter) / 64 for letter in PROMPT[1:])]


def body(**fields: Any) -> dict[str, Any]:
    return {
        **{"model": "mock", "prompt": PROMPT, "echo": True, "logprobs": 1, "temperature": 0},
        **fields,
    }


async def choice_of(running: Running, **fields: Any) -> dict[str, Any]:
    answer = await running.post("/v1/completions", **body(**fields))
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    found: dict[str, Any] = choice
    return found


async def test_a_prompt_is_scored_without_an_answer() -> None:
    async with router(FakeWorker(script=saying("abc"))) as running:
        answer = (await running.post("/v1/completions", **body(max_tokens=0))).json()
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == list(PROMPT)
        assert logprobs["token_logprobs"] == SCORES
        assert logprobs["text_offset"] == list(range(len(PROMPT)))
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["top_logprobs"][1] == {"\t": -9 / 64, "e": -ord("e") / 64}
        assert answer["usage"]["prompt_tokens"] == len(PROMPT)
        assert answer["usage"]["completion_tokens"] == 0


async def test_the_answer_follows_the_prompt() -> None:
    async with router(FakeWorker(script=saying("abc"))) as running:
        choice = await choice_of(running, max_tokens=2)
        assert choice["text"] == PROMPT + "ab"
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == list(PROMPT + "ab")
        assert logprobs["token_logprobs"] == [*SCORES, -0.5, -0.5]
        assert logprobs["text_offset"] == list(range(len(PROMPT) + 2))
        assert len(logprobs["top_logprobs"]) == len(PROMPT) + 2


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("tokens_per_step", [1, 5])
async def test_a_stream_has_the_same(max_tokens: int, tokens_per_step: int) -> None:
    worker = FakeWorker(script=saying("abc"))
    worker.tokens_per_step = tokens_per_step
    async with router(worker) as running:
        fields = {"max_tokens": max_tokens, "n": 2, "prompt": [PROMPT, "you"]}
        answer = (await running.post("/v1/completions", **body(**fields))).json()
        events = await running.events("/v1/completions", **body(**fields, return_token_ids=True))
        for whole in answer["choices"]:
            parts = [
                part
                for event in events
                for part in event["choices"]
                if part["index"] == whole["index"]
            ]
            assert "".join(part["text"] for part in parts) == whole["text"]
            for name, values in whole["logprobs"].items():
                streamed = [
                    value for part in parts if part["logprobs"] for value in part["logprobs"][name]
                ]
                assert streamed == values


async def test_prompts_of_one_token_have_nothing_to_score() -> None:
    async with router(FakeWorker(script=saying("abc"))) as running:
        choice = await choice_of(running, prompt=[104], max_tokens=0)
        assert choice["text"] == "h"
        assert choice["logprobs"]["token_logprobs"] == [None]


async def test_a_scored_prompt_is_not_sent_to_prefill_workers() -> None:
    workers = [FakeWorker("p", role="prefill"), FakeWorker("d", role="decode")]
    async with router(*workers) as running:
        await choice_of(running, max_tokens=1)
        await choice_of(running, max_tokens=1, echo=False)
        scored, plain = workers[1].submits
        assert (scored.params.prompt_logprobs, scored.prefill) == (1, [])
        assert plain.params.prompt_logprobs is None
        assert [peer.worker_id for peer in plain.prefill] == ["p"]


@pytest.mark.parametrize("after", [0, 2])
async def test_every_token_is_scored_once_though_a_worker_dies(after: int) -> None:
    workers = [FakeWorker("a", script=saying("abcd")), FakeWorker("b", script=saying("abcd"))]
    async with router(*workers) as running:
        for worker in workers:
            worker.finish_at = (after, "moved") if after else None
            worker.hold_after = None
        if not after:
            workers[0].finish_at = workers[1].finish_at = None
        choice = await choice_of(running, max_tokens=4, prompt=PROMPT)
        assert choice["logprobs"]["token_logprobs"][: len(PROMPT)] == SCORES
        assert text_of([{"choices": [choice]}]).startswith(PROMPT)


async def test_a_worker_that_scores_nothing_is_an_error_and_not_a_wrong_answer() -> None:
    worker = FakeWorker()
    worker.scores_prompts = False
    async with router(worker) as running:
        answer = await running.post("/v1/completions", **body(max_tokens=0))
        assert answer.status_code >= 500
        assert "reports no logprobs of prompts" in answer.json()["error"]["message"]
