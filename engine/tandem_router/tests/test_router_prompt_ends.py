"""Where a prompt begins and ends, and what ends an answer: three fields of vLLM's clients."""

from typing import Any

import pytest

from tandem_router.tests.fake_worker import EOS, FakeWorker, saying
from tandem_router.tests.harness import router, text_of
from tandem_router.text.chat_template import ChatTemplate
from tandem_router.text.model import TextModel
from tandem_router.text.tokenizer import ByteTokenizer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]


@pytest.mark.parametrize("tokens_per_step", [1, 50])
@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/completions", {"include_stop_str_in_output": True}),
        ("/v1/completions", {"no_stop_trim": True}),
        ("/v1/chat/completions", {"include_stop_str_in_output": True}),
        ("/generate", {"no_stop_trim": True}),
        ("/generate", {"sampling_params": {"no_stop_trim": True}}),
    ],
)
async def test_a_stop_string_stays_where_it_is_asked_for(
    path: str, field: dict[str, Any], tokens_per_step: int
) -> None:
    worker = FakeWorker(script=saying("Hello world! More."))
    worker.tokens_per_step = tokens_per_step
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "x", "max_tokens": 100},
        "/v1/chat/completions": {"messages": CHAT[:1]},
        "/generate": {"text": "x", "max_new_tokens": 100},
    }
    async with router(worker) as running:
        body = {**bodies[path], "stop": ["zz", "o wo"], **field}
        answer = (await running.post(path, **body)).json()
        choice = answer if path == "/generate" else answer["choices"][0]
        assert choice.get("text", choice.get("message", {}).get("content")) == "Hello wo"
        if path != "/v1/completions":
            return
        assert choice["finish_reason"] == "stop"
        assert text_of(await running.events(path, **body)) == "Hello wo"
        without = {name: value for name, value in body.items() if name not in field}
        assert text_of(await running.events(path, **without)) == "Hell"


async def test_a_stop_token_stays_and_eos_is_no_text() -> None:
    tokens = [*b"ab.cd", EOS]
    async with router(FakeWorker(script=lambda _, i: tokens[i])) as running:
        body = {"prompt": "x", "skip_special_tokens": False, "include_stop_str_in_output": True}
        for ends, text in (([ord(".")], "ab."), ([], "abcd"), ([EOS], "ab.cd")):
            answer = await running.post("/v1/completions", **body, stop_token_ids=ends)
            wanted = "ab.cd" if not ends else text
            assert answer.json()["choices"][0]["text"] == wanted


async def test_the_routers_own_stop_is_never_shown() -> None:
    async with router(FakeWorker(script=saying("Fine.\nUser: and you?"))) as running:
        answer = await running.post(
            "/v1/chat/completions", messages=CHAT[:1], include_stop_str_in_output=True
        )
        assert answer.json()["choices"][0]["message"]["content"] == "Fine."


@pytest.mark.parametrize("prompts", [{}, {"add_generation_prompt": False}])
async def test_the_last_message_is_continued(prompts: dict[str, bool]) -> None:
    worker = FakeWorker(script=saying("yes"))
    async with router(worker) as running:
        body = {"messages": CHAT, "continue_final_message": True, **prompts}
        answer = await running.post("/v1/chat/completions", **body)
        counted = await running.post("/tokenize", **body)
    assert answer.json()["choices"][0]["message"]["content"] == "yes"
    assert bytes(worker.submits[0].tokens) == b"User: hi\nAssistant: Well, "
    assert counted.json()["tokens"] == worker.submits[0].tokens


async def test_without_it_an_answer_is_a_new_message() -> None:
    worker = FakeWorker(script=saying("yes"))
    async with router(worker) as running:
        for value in (None, True, False):
            body = {"messages": CHAT, "add_generation_prompt": value}
            await running.post("/v1/chat/completions", **body)
    new, also, none = (bytes(submit.tokens) for submit in worker.submits)
    assert new == also == b"User: hi\nAssistant: Well, \nAssistant:"
    assert none == b"User: hi\nAssistant: Well, \n"


async def test_only_the_end_of_a_prompt_is_kept() -> None:
    worker = FakeWorker(script=saying("ok"), max_model_len=10)
    async with router(worker) as running:
        for body in (
            {"prompt": "0123456789abcdef", "truncate_prompt_tokens": 4, "max_tokens": 2},
            {"prompt": [1, 2, 3], "truncate_prompt_tokens": 2, "max_tokens": 2},
            {"prompt": "ab", "truncate_prompt_tokens": 4, "max_tokens": 2},
            {"prompt": "0123456789abcdef", "truncate_prompt_tokens": -1, "max_tokens": 2},
        ):
            answer = (await running.post("/v1/completions", **body)).json()
            assert answer["usage"]["prompt_tokens"] == len(worker.submits[-1].tokens)
        chat = {"messages": CHAT[:1], "truncate_prompt_tokens": 6, "max_tokens": 2}
        await running.post("/v1/chat/completions", **chat)
        counted = await running.post("/tokenize", **chat)
        refused = await running.post(
            "/v1/completions", prompt="0123456789abcdef", truncate_prompt_tokens=10, max_tokens=2
        )
    texts = [bytes(submit.tokens) for submit in worker.submits]
    assert texts == [b"cdef", bytes([2, 3]), b"ab", b"89abcdef", b"stant:"]
    assert counted.json()["count"] == 6
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_a_begin_of_sequence_token_stays_the_first() -> None:
    model = TextModel(ByteTokenizer(), ChatTemplate(None, {}))
    bos = model.tokenizer.bos_token_id
    assert bos is not None
    prompt = [bos, 1, 2, 3, 4]
    assert model.shorten(prompt, 3) == [bos, 3, 4]
    assert model.shorten(prompt, 1) == [bos]
    assert model.shorten(prompt, 5) == prompt
    assert model.shorten(prompt[1:], 2) == [3, 4]
    assert model.shorten([], 2) == []
