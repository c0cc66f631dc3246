"""Request fields: honoured, accepted for being harmless, or refused by their name."""

from typing import Any

import pytest
from pydantic import BaseModel

from tandem_router.api.fields import HARMLESS, REFUSED
from tandem_router.api.schema import ChatRequest, CompletionRequest, GenerateRequest
from tandem_router.tests.fake_worker import FakeWorker, saying
from tandem_router.tests.harness import router, text_of

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi"},
    "/generate": {"text": "hi"},
}

# What clients send with every request, whether they were asked to or not.
OPENAI_SDK = {
    "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
    "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "parallel_tool_calls": True, "prediction": {"type": "content", "content": "x"},
    "tools": [], "tool_choice": "", "functions": [], "function_call": "auto",
    "modalities": ["text"], "audio": None, "response_format": {"type": "text"},
    "verbosity": "medium", "reasoning_effort": None, "web_search_options": None,
}  # fmt: skip
VLLM_CLIENT = {
    "best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "top_k": -1, "min_p": 0.0,
    "repetition_penalty": 1.0, "stop_token_ids": [], "include_stop_str_in_output": False,
    "ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "truncate_prompt_tokens": None,
    "prompt_logprobs": None, "allowed_token_ids": None, "bad_words": [], "priority": 0,
    "request_id": "r", "guided_json": None, "logits_processors": None, "echo": False,
    "return_tokens_as_token_ids": False,
}  # fmt: skip
CHAT_ONLY = {
    "add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False,
    "documents": None, "chat_template": None, "chat_template_kwargs": None,
    "mm_processor_kwargs": None, "include_reasoning": True,
}  # fmt: skip
GUIDELLM = {
    "stream": True, "ignore_eos": True, "stop": None, "max_tokens": 4,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", OPENAI_SDK),
        ("/v1/chat/completions", VLLM_CLIENT),
        ("/v1/chat/completions", CHAT_ONLY),
        ("/v1/chat/completions", GUIDELLM),
        ("/v1/completions", OPENAI_SDK),
        ("/v1/completions", VLLM_CLIENT),
        ("/v1/completions", GUIDELLM),
        ("/generate", {"rid": "r", "logprob_start_len": -1, "return_text_in_logprobs": True}),
        ("/generate", {"sampling_params": {"no_stop_trim": False, "regex": None, "n": 1}}),
    ],
)
async def test_what_clients_send_without_effect_is_accepted(
    path: str, fields: dict[str, Any]
) -> None:
    async with router(FakeWorker(script=saying("ok"))) as running:
        answer = await running.post(path, **BODIES[path], **fields)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", list(BODIES))
async def test_every_other_field_is_refused_by_its_name(path: str) -> None:
    schemas: dict[str, type[BaseModel]] = {
        "/v1/chat/completions": ChatRequest,
        "/v1/completions": CompletionRequest,
        "/generate": GenerateRequest,
    }
    refused = REFUSED.keys() - schemas[path].model_fields.keys()
    worker = FakeWorker()
    async with router(worker) as running:
        for name in (*refused, "surprise"):
            answer = await running.post(path, **BODIES[path], **{name: {"some": "thing"}})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, name)
            assert error["message"].startswith(f"{name}: ")
            # Left out in the way in which many clients leave fields out.
            answer = await running.post(path, **BODIES[path], **{name: None}, stream=True)
            assert answer.status_code == 200, answer.text
    assert len(worker.submits) == len(refused) + 1


def test_no_field_is_in_two_lists() -> None:
    honoured = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    assert not HARMLESS & (honoured | REFUSED.keys() | GenerateRequest.model_fields.keys())


async def test_a_slip_is_told_what_was_meant() -> None:
    async with router(FakeWorker()) as running:
        for path, name, meant in (
            ("/v1/completions", "temprature", "temperature"),
            ("/v1/completions", "max_new_tokens", "max_tokens"),
            ("/v1/chat/completions", "prompt", "messages"),
            ("/generate", "max_tokens", "max_new_tokens"),
            ("/generate", "sampling_seed", "seed"),
        ):
            answer = await running.post(path, **BODIES[path], **{name: 1})
            assert f"did you mean {meant}?" in answer.json()["error"]["message"]


async def test_usage_in_every_chunk() -> None:
    async with router(FakeWorker()) as running:
        for path in ("/v1/completions", "/v1/chat/completions"):
            options = {"include_usage": True, "continuous_usage_stats": True}
            body = {**BODIES[path], "max_tokens": 3, "n": 2, "stream_options": options}
            body["return_token_ids"] = True  # completions then begin with a chunk without tokens
            events = await running.events(path, **body)
            counts = [event["usage"]["completion_tokens"] for event in events]
            assert counts == sorted(counts)
            assert counts[-2:] == [6, 6]
            assert events[-1]["choices"] == []
            assert len({event["usage"]["prompt_tokens"] for event in events}) == 1
            body["stream_options"] = {"continuous_usage_stats": True}
            events = await running.events(path, **body)
            assert events[-1]["usage"]["completion_tokens"] == 6
            assert events[-1]["choices"]
            assert "tandem" in events[-1]


async def test_a_missing_model_is_the_one_that_is_served() -> None:
    async with router(FakeWorker(script=saying("ok"))) as running:
        for path in ("/v1/completions", "/v1/chat/completions"):
            answer = (await running.post(path, **BODIES[path])).json()
            assert answer["model"] == "mock"
            events = await running.events(path, **BODIES[path])
            fingerprints = {event["system_fingerprint"] for event in (*events, answer)}
            assert len(fingerprints) == 1
            assert fingerprints.pop().startswith("fp_")
        assert text_of(await running.events("/v1/completions", prompt="x")) == "ok"


async def test_the_fingerprint_follows_the_model() -> None:
    found = set()
    for group in ("one", "other", "one"):
        async with router(FakeWorker(compatibility_hash=group)) as running:
            answer = await running.post("/v1/completions", prompt="x")
            found.add(answer.json()["system_fingerprint"])
    assert len(found) == 2


@pytest.mark.parametrize(
    ("path", "body", "forms"),
    [
        ("/v1/completions", {"prompt": 5}, ["a string", "a list of strings", "token ids", "lists"]),
        ("/v1/completions", {"prompt": "x", "stop": 5}, ["a string", "a list of strings"]),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": 5}]},
            ["string", "text"],
        ),
        ("/generate", {"text": [1]}, ["a string", "a list of strings"]),
        ("/generate", {"input_ids": "x"}, ["a list of token ids", "list of lists"]),
        ("/v1/completions", {"prompt": "x", "model": "no"}, ["'mock'"]),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "x"}}, ['"text"']),
        ("/v1/chat/completions", {**CHAT, "tool_choice": "x"}, ['"none"', '"auto"']),
    ],
)
async def test_errors_name_every_accepted_form(
    path: str, body: dict[str, Any], forms: list[str]
) -> None:
    async with router(FakeWorker()) as running:
        message = (await running.post(path, **body)).json()["error"]["message"]
        assert all(form in message for form in forms), message


async def test_logit_bias_reaches_the_worker_from_generate_too() -> None:
    worker = FakeWorker(script=saying("ok"))
    async with router(worker) as running:
        await running.post("/generate", text="x", sampling_params={"logit_bias": {"7": 1.5}})
        await running.post("/generate", text="x", logit_bias={"8": 1})
    assert [submit.params.logit_bias for submit in worker.submits] == [{7: 1.5}, {8: 1.0}]


async def test_a_request_can_be_sent_to_tokenize_as_it_is() -> None:
    async with router(FakeWorker()) as running:
        for fields in (OPENAI_SDK, {**VLLM_CLIENT, "max_tokens": 5, "temperature": 0, "n": 2}):
            answer = await running.post("/tokenize", **CHAT, **fields)
            assert answer.status_code == 200, answer.text
        answer = await running.post("/tokenize", **CHAT, tools=[{"type": "function"}])
        assert answer.json()["error"]["param"] == "tools"  # they would be part of the prompt


async def test_tokenize_honours_what_it_takes() -> None:
    async with router(FakeWorker()) as running:
        answer = await running.post("/tokenize", prompt="hé", return_token_strs=True)
        assert answer.json()["token_strs"] == ["h", "\ufffd", "\ufffd"]
