"""What is beside generation: the description of the API, CORS, paths with a slash too many."""

import re
from importlib import metadata
from typing import Any

import pytest

from tandem_router.api.cors import parse_origins
from tandem_router.app import ROUTES
from tandem_router.tests.fake_worker import FakeWorker, saying
from tandem_router.tests.harness import Running, router

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "mock", "prompt": "hi"},
    "/generate": {"text": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104]},
}


async def ask(running: Running, route: Any, suffix: str = "") -> Any:
    path = route.path.replace("{model_id:path}", "mock") + suffix
    if route.method == "GET":
        return await running.http.get(path)
    return await running.http.post(path, json=BODIES[route.path])


async def test_a_slash_at_the_end_makes_no_difference() -> None:
    async with router(FakeWorker(script=saying("ok"))) as running:
        for route in ROUTES:
            for suffix in ("", "/", "//"):
                answer = await ask(running, route, suffix)
                assert answer.status_code == 200, (route.path, suffix, answer.text)
        assert (await running.http.get("/")).status_code == 404


async def test_version_and_description_need_no_key() -> None:
    async with router(FakeWorker(), api_keys=("k",)) as running:
        answer = await running.http.get("/version")
        assert answer.json() == {"version": metadata.version("tandem-inference")}
        document = (await running.http.get("/openapi.json")).json()
        served = {(route.path.replace(":path}", "}"), route.method.lower()) for route in ROUTES}
        described = {(path, m) for path, entry in document["paths"].items() for m in entry}
        assert described == served
        for path, entry in document["paths"].items():
            for operation in entry.values():
                assert operation["summary"], path
        page = (await running.http.get("/docs")).text
        assert all(route.path.replace(":path}", "}") in page for route in ROUTES)
        assert "http://" not in page
        assert "https://" not in page


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if "$ref" in value else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


async def test_the_description_is_whole_and_names_the_forms_of_a_prompt() -> None:
    async with router(FakeWorker()) as running:
        document = (await running.http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    found = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert found <= schemas.keys()
    prompt = schemas["CompletionRequest"]["properties"]["prompt"]
    assert [form["type"] for form in prompt["anyOf"]] == ["string", "array", "array", "array"]
    assert "user" in schemas["ChatRequest"]["properties"]
    assert "tools" not in schemas["ChatRequest"]["properties"]
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert schemas["ChatRequest"]["required"] == ["messages"]


PREFLIGHT = {
    "origin": "https://app.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, x-stainless-os",
}


async def test_pages_of_other_origins_may_not_call_unless_configured() -> None:
    async with router(FakeWorker(script=saying("ok"))) as running:
        answer = await running.http.options("/v1/completions", headers=PREFLIGHT)
        assert answer.status_code == 405
        answer = await running.http.get("/v1/models", headers={"origin": "https://app.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", [("*",), ("https://other.example", "https://app.example")])
async def test_pages_of_configured_origins_may_call(origins: tuple[str, ...]) -> None:
    worker = FakeWorker(script=saying("ok"))
    async with router(worker, cors_origins=origins, api_keys=("k",)) as running:
        allowed = "*" if origins == ("*",) else "https://app.example"
        for path in ("/v1/completions", "/v1/chat/completions/", "/v1/models"):
            answer = await running.http.options(path, headers=PREFLIGHT)
            assert answer.status_code == 204  # a preflight carries no key
            assert answer.headers["access-control-allow-origin"] == allowed
            assert "POST" in answer.headers["access-control-allow-methods"]
            assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
        headers = {"origin": "https://app.example", "authorization": "Bearer k"}
        for path, status in (("/v1/completions", 200), ("/nowhere", 404)):
            for stream in (False, True):
                body = {**BODIES["/v1/completions"], "stream": stream}
                answer = await running.http.post(path, json=body, headers=headers)
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == allowed
        # An error has to be readable as well, also that of a missing key.
        answer = await running.http.post("/generate", headers={"origin": "https://app.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, allowed)
        if allowed != "*":
            headers["origin"] = "https://evil.example"
            answer = await running.http.get("/v1/models", headers=headers)
            assert answer.status_code == 200
            assert "access-control-allow-origin" not in answer.headers


def test_origins_are_checked() -> None:
    assert parse_origins(["*", "HTTPS://App.example:8443"]) == ("*", "https://app.example:8443")
    for wrong in ("app.example", "https://app.example/", "https://", "null"):
        with pytest.raises(ValueError, match=re.escape(f"--cors-origin: {wrong!r}")):
            parse_origins([wrong])


async def test_a_wrong_path_or_method_is_told_what_there_is() -> None:
    async with router(FakeWorker()) as running:
        assert "/docs" in (await running.http.get("/v2/x")).json()["error"]["message"]
        answer = await running.http.get("/v1/completions")
        assert "use POST" in answer.json()["error"]["message"]


async def test_metrics_and_state_are_not_for_clients() -> None:
    """They have a port of their own, on which nothing else is."""
    async with router(FakeWorker(), api_keys=("k",)) as running:
        for path in ("/metrics", "/state"):
            for key in ("", "k"):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                answer = await running.http.get(path, headers=headers)
                assert answer.status_code == 404, path
            assert (await running.monitor.get(path)).status_code == 200, path
        assert "/metrics" not in (await running.http.get("/docs")).text
        for route in ROUTES:
            answer = await running.monitor.request(route.method, route.path)
            assert answer.status_code == 404, route.path
        assert "/metrics and /state" in answer.json()["error"]["message"]
        assert (await running.monitor.post("/state")).status_code == 405
