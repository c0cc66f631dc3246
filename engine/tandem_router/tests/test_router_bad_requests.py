"""Every wrong request gets its status, OpenAI's error shape, and the parameter's name."""

import json
from typing import Any

import httpx
import pytest

from tandem_router.tests.bad_requests import BAD, BAD_GENERATE, COMPLETION
from tandem_router.tests.fake_worker import FakeWorker
from tandem_router.tests.harness import Running, router, until
from tandem_wire.messages import RefusalCode, Refused


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
        assert answer.status_code == 400
        assert check_shape(answer.json())["code"] == "context_length_exceeded"
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
            ("/detokenize", {"tokens": [9], "spaces": True}, "spaces"),
            ("/tokenize", {"prompt": "x", "promt": "y"}, "promt"),
            ("/tokenize", {"prompt": "x", "truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
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
    async with router(FakeWorker(), api_keys=("secret", "other")) as running:
        assert (await _complete(running, None)).status_code == 401
        for header in ("Bearer wrong", "Basic secret", "secret", "Bearer"):
            answer = await _complete(running, header)
            assert answer.status_code == 401
            assert check_shape(answer.json())["code"] == "invalid_api_key"
        assert (await _complete(running, "Bearer other")).status_code == 200
        assert (await running.http.get("/v1/models")).status_code == 401
        for path in ("/health", "/ready"):
            assert (await running.http.get(path)).status_code == 200


async def _complete(running: Running, header: str | None) -> httpx.Response:
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
        assert (await running.http.get("/ready")).status_code == 503, "its fixed list has none yet"
        text = (await running.monitor.get("/metrics")).text
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


@pytest.mark.parametrize(
    ("code", "expected"), [("too_long", "context_length_exceeded"), ("invalid", None)]
)
async def test_what_the_worker_alone_can_know(code: RefusalCode, expected: str | None) -> None:
    worker = FakeWorker()
    worker.refusal = Refused("", code, "no way")
    async with router(worker) as running:
        answer = await running.post("/v1/completions", **COMPLETION, stream=True)
        assert answer.status_code == 400
        error = check_shape(answer.json())
        assert error["code"] == expected
        assert "no way" in error["message"]
        for words in ("maximum context length is 4096 tokens", "(code: context_length_exceeded)"):
            assert (words in error["message"]) == bool(expected)


def test_there_are_enough_of_them() -> None:
    assert len(BAD) + len(BAD_GENERATE) >= 20
