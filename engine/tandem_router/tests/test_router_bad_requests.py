"""Every wrong request gets its status, OpenAI's error shape, and the parameter's name."""

import json
from typing import Any

import pytest

from tandem_router.tests.fake_worker import FakeWorker
from tandem_router.tests.harness import Running, router, until
from tandem_wire.messages import Refused

COMPLETION = {"model": "mock", "prompt": "hi"}
CHAT = {"model": "mock", "messages": [{"role": "user", "content": "hi"}]}
USER = {"role": "user", "content": "hi"}

BAD: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("completions", {"prompt": "hi"}, 400, "model"),
    ("completions", {"model": "mock"}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": ""}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": []}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": 5}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": ["a", 5]}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": [[1], []]}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": [-1]}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": [512]}, 400, "prompt"),
    ("completions", {"model": "nobody", "prompt": "hi"}, 404, "model"),
    ("completions", {**COMPLETION, "model": 7}, 400, "model"),
    ("completions", {**COMPLETION, "max_tokens": 0}, 400, "max_tokens"),
    ("completions", {**COMPLETION, "max_tokens": -3}, 400, "max_tokens"),
    ("completions", {**COMPLETION, "max_tokens": "many"}, 400, "max_tokens"),
    ("completions", {**COMPLETION, "max_tokens": 1.5}, 400, "max_tokens"),
    ("completions", {**COMPLETION, "max_tokens": 100000}, 413, "max_tokens"),
    ("completions", {"model": "mock", "prompt": "x" * 5000}, 413, "prompt"),
    ("completions", {"model": "mock", "prompt": "x" * 20000}, 413, "prompt"),
    ("completions", {**COMPLETION, "min_tokens": 30, "max_tokens": 20}, 400, "min_tokens"),
    ("completions", {**COMPLETION, "temperature": -0.1}, 400, "temperature"),
    ("completions", {**COMPLETION, "temperature": "hot"}, 400, "temperature"),
    ("completions", {**COMPLETION, "temperature": True}, 400, "temperature"),
    ("completions", {**COMPLETION, "top_p": 0}, 400, "top_p"),
    ("completions", {**COMPLETION, "top_p": 1.1}, 400, "top_p"),
    ("completions", {**COMPLETION, "top_k": -2}, 400, "top_k"),
    ("completions", {**COMPLETION, "min_p": 2}, 400, "min_p"),
    ("completions", {**COMPLETION, "n": 0}, 400, "n"),
    ("completions", {**COMPLETION, "n": 1000}, 400, "n"),
    ("completions", {**COMPLETION, "best_of": 3}, 400, "best_of"),
    ("completions", {**COMPLETION, "presence_penalty": 3}, 400, "presence_penalty"),
    ("completions", {**COMPLETION, "frequency_penalty": -3}, 400, "frequency_penalty"),
    ("completions", {**COMPLETION, "repetition_penalty": 0}, 400, "repetition_penalty"),
    ("completions", {**COMPLETION, "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("completions", {**COMPLETION, "logit_bias": {"600": 1}}, 400, "logit_bias"),
    ("completions", {**COMPLETION, "logit_bias": {"6": 101}}, 400, "logit_bias.6"),
    ("completions", {**COMPLETION, "logprobs": 21}, 400, "logprobs"),
    ("completions", {**COMPLETION, "logprobs": 1, "echo": True}, 400, "echo"),
    ("completions", {**COMPLETION, "stop": ""}, 400, "stop[0]"),
    ("completions", {**COMPLETION, "stop": ["a"] * 17}, 400, "stop"),
    ("completions", {**COMPLETION, "stop": 5}, 400, "stop"),
    ("completions", {**COMPLETION, "stop_token_ids": ["a"]}, 400, "stop_token_ids[0]"),
    ("completions", {**COMPLETION, "seed": "lucky"}, 400, "seed"),
    ("completions", {**COMPLETION, "stream": "yes"}, 400, "stream"),
    ("completions", {**COMPLETION, "stream_options": {}}, 400, "stream_options"),
    ("completions", {**COMPLETION, "slo_class": "gold"}, 400, "slo_class"),
    ("completions", {**COMPLETION, "priority": 1.5}, 400, "priority"),
    ("completions", {**COMPLETION, "suffix": "end"}, 400, "suffix"),
    ("completions", {**COMPLETION, "user": 5}, 400, "user"),
    ("chat/completions", {"model": "mock"}, 400, "messages"),
    ("chat/completions", {"model": "mock", "messages": []}, 400, "messages"),
    ("chat/completions", {"model": "mock", "messages": "hi"}, 400, "messages"),
    ("chat/completions", {"model": "mock", "messages": ["hi"]}, 400, "messages[0]"),
    (
        "chat/completions",
        {"model": "mock", "messages": [USER, {"content": "x"}]},
        400,
        "messages[1].role",
    ),
    (
        "chat/completions",
        {"model": "mock", "messages": [{"role": "king", "content": "x"}]},
        400,
        "messages[0].role",
    ),
    ("chat/completions", {"model": "mock", "messages": [{"role": "user"}]}, 400, "messages[0]"),
    (
        "chat/completions",
        {"model": "mock", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content[0].type",
    ),
    ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs"),
    ("chat/completions", {**CHAT, "logprobs": 3}, 400, "logprobs"),
    ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools"),
    (
        "chat/completions",
        {**CHAT, "response_format": {"type": "json_object"}},
        400,
        "response_format",
    ),
    ("chat/completions", {**CHAT, "max_completion_tokens": 0}, 400, "max_completion_tokens"),
    ("chat/completions", {**CHAT, "model": "nobody"}, 404, "model"),
]

BAD_GENERATE: list[tuple[dict[str, Any], int, str | None]] = [
    ({}, 400, "text"),
    ({"text": "a", "input_ids": [1]}, 400, "text"),
    ({"text": [1, 2]}, 400, "text"),
    ({"input_ids": "a"}, 400, "input_ids"),
    ({"text": "a", "max_new_tokens": 0}, 400, "max_new_tokens"),
    ({"text": "a", "sampling_params": {"top_p": 2}}, 400, "sampling_params.top_p"),
    ({"text": "a", "sampling_params": 5}, 400, "sampling_params"),
]


def check_shape(body: dict[str, Any]) -> dict[str, Any]:
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    return dict(error)


async def test_bad_requests_are_refused_by_name() -> None:
    worker = FakeWorker()
    async with router(worker) as running:
        for path, body, status, param in BAD:
            answer = await running.post(f"/v1/{path}", **body)
            error = check_shape(answer.json())
            assert (answer.status_code, error["param"]) == (status, param), (body, error)
            if param and status == 400:
                assert param.split("[")[0].split(".")[0] in error["message"], error
        for body, status, param in BAD_GENERATE:
            answer = await running.post("/generate", **body)
            error = check_shape(answer.json())
            assert (answer.status_code, error["param"]) == (status, param), (body, error)
        # A stream is refused with a status, too, before it has begun.
        answer = await running.post("/v1/completions", **COMPLETION, max_tokens=10**6, stream=True)
        assert answer.status_code == 413
        assert worker.submits == []


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"null", 400),
        (b'{"model": "mock", "prompt": "\xff"}', 400),
        (b'{"model": NaN, "prompt": "x"}', 400),
        (b'{"prompt": "' + b"x" * 2000 + b'"}', 413),
    ],
)
async def test_bad_bodies(content: bytes, status: int) -> None:
    async with router(FakeWorker(), max_body_bytes=1000) as running:
        for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/tokenize"):
            answer = await running.http.post(path, content=content)
            assert answer.status_code == status, answer.text
            check_shape(answer.json())


async def test_bad_token_requests() -> None:
    async with router(FakeWorker()) as running:
        for path, body, param in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": 5}, "prompt"),
            ("/detokenize", {}, "tokens"),
            ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
            ("/detokenize", {"tokens": [99999]}, "tokens"),
        ):
            answer = await running.post(path, **body)
            assert answer.status_code == 400
            assert check_shape(answer.json())["param"] == param


async def test_unknown_paths_and_methods() -> None:
    async with router(FakeWorker()) as running:
        answer = await running.http.get("/v2/nothing")
        assert answer.status_code == 404
        check_shape(answer.json())
        answer = await running.http.get("/v1/completions")
        assert answer.status_code == 405
        check_shape(answer.json())


async def test_api_keys() -> None:
    async with router(FakeWorker(), api_keys=frozenset({"secret", "other"})) as running:
        assert (await _complete(running, None)).status_code == 401
        for header in ("Bearer wrong", "Basic secret", "secret", "Bearer"):
            answer = await _complete(running, header)
            assert answer.status_code == 401
            assert check_shape(answer.json())["code"] == "invalid_api_key"
        assert (await _complete(running, "Bearer other")).status_code == 200
        assert (await running.http.get("/v1/models")).status_code == 401
        for path in ("/health", "/ready", "/metrics"):
            assert (await running.http.get(path)).status_code == 200


async def _complete(running: Running, header: str | None):  # type: ignore[no-untyped-def]
    headers = {"authorization": header} if header is not None else {}
    return await running.http.post(
        "/v1/completions", content=json.dumps(COMPLETION), headers=headers
    )


async def test_no_worker_at_all() -> None:
    async with router(queue_seconds=0.05) as running:
        answer = await running.post("/v1/completions", **COMPLETION)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        check_shape(answer.json())
        assert (await running.http.get("/ready")).status_code == 503
        text = (await running.http.get("/metrics")).text
        assert 'tandem_rejected_total{model="mock",reason="no_worker"} 1.0' in text


async def test_only_prefill_workers() -> None:
    async with router(FakeWorker(role="prefill"), queue_seconds=0.2) as running:
        answer = await running.post("/v1/completions", **COMPLETION)
        assert answer.status_code == 503


async def test_every_worker_full() -> None:
    worker = FakeWorker()
    worker.refusal = Refused("", "no_room", "full up", retry_after_seconds=3)
    async with router(worker, queue_seconds=0.2) as running:
        answer = await running.post("/v1/completions", **COMPLETION)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "3"
        assert "full up" in check_shape(answer.json())["message"]
        worker.refusal = None
        await until(lambda: running.context.dispatcher.num_inflight == 0)
        await until(lambda: not running.context.fleet.links[0].running)


async def test_too_many_in_flight() -> None:
    async with router(FakeWorker(), max_inflight=2) as running:
        answer = await running.post("/v1/completions", **COMPLETION, n=3)
        assert answer.status_code == 429
        check_shape(answer.json())


@pytest.mark.parametrize(("code", "status"), [("too_long", 413), ("invalid", 400)])
async def test_what_the_worker_alone_can_know(code: str, status: int) -> None:
    worker = FakeWorker()
    worker.refusal = Refused("", code, "no way")  # type: ignore[arg-type]
    async with router(worker) as running:
        answer = await running.post("/v1/completions", **COMPLETION, stream=True)
        assert answer.status_code == status
        assert check_shape(answer.json())["message"] == "no way"


def test_there_are_enough_of_them() -> None:
    assert len(BAD) + len(BAD_GENERATE) >= 20
