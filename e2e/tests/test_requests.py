"""Requests that can't be served, and clients that leave: typed answers, and nothing left behind.

One service of mock workers whose model is as the router's own list of bad requests wants it.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from deadlines import patience

from tandem_router.tests.bad_requests import BAD, BAD_GENERATE
from tests.service import Service, is_ready, mock_manifest
from tests.streams import completion, run_streams
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

REQUESTS = [(f"/v1/{path}", body, status, param) for path, body, status, param in BAD]
REQUESTS += [("/generate", body, status, param) for body, status, param in BAD_GENERATE]
# Streams that would take minutes: one that ends sooner was cancelled.
LONG = {"model": "mock", "max_tokens": 3000, "ignore_eos": True}
AT_REST = {"running": 0, "waiting": 0, "leases": 0, "owned": 0, "leased": 0, "leaked": 0}


@pytest.fixture(scope="module")
def mock(tandem: Any) -> Iterator[Service]:
    manifest = mock_manifest(
        "mock",
        decode=1,
        model={"uri": "mock://tiny?decode_ms=50&prefill_ms=200", "maxModelLen": 4096},
    )
    with Service.running(tandem, manifest) as service:
        yield service


@pytest.fixture(scope="module")
def http(mock: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=mock.url, timeout=patience(30)) as client:
        yield client


@pytest.mark.parametrize(("path", "body", "status", "param"), REQUESTS)
def test_bad_requests_are_refused(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


@pytest.mark.parametrize(
    ("content", "status"), [(b"", 400), (b"{", 400), (b"[]", 400), (b"\xff", 400)]
)
def test_bad_bodies_are_refused(http: httpx.Client, content: bytes, status: int) -> None:
    answer = http.post("/v1/chat/completions", content=content)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_unknown_models_paths_and_methods(http: httpx.Client) -> None:
    assert http.get("/v1/models/nobody").status_code == 404
    assert http.get("/v2/nothing").json()["error"]["message"]
    assert http.get("/v1/completions").status_code == 405


def test_a_prompt_longer_than_the_model(http: httpx.Client) -> None:
    body = {"model": "mock", "prompt": "x" * 4097, "stream": True}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 4096 tokens" in error["message"]
    assert http.post("/v1/completions", json={**body, "prompt": "x"}).status_code == 200


def test_clients_that_leave(mock: Service, http: httpx.Client) -> None:
    """While they stream, while their prompt is prefilled, while they wait for a whole answer."""
    expected = asyncio.run(run_streams(mock.url, [completion("mock", "stay", 20)]))

    async def streams_and_leaves(client: httpx.AsyncClient, index: int) -> None:
        body = {**LONG, "prompt": f"{index}: leaving", "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            for _ in range(1 + index % 5):
                await anext(lines)

    async def waits_and_leaves(client: httpx.AsyncClient, index: int) -> None:
        # The prompt takes two steps of 200 ms: some leave before it is prefilled, some later.
        body = {**LONG, "max_tokens": 500, "prompt": f"{index} " + "long " * 600}
        with contextlib.suppress(httpx.ReadTimeout):
            leaves = httpx.Timeout(patience(60), read=0.1 + index / 10)
            await client.post("/v1/completions", json=body, timeout=leaves)
            raise AssertionError("the request was answered: the client never left")

    async def everybody_leaves() -> None:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(
            base_url=mock.url, timeout=patience(60), limits=limits
        ) as client:
            await asyncio.gather(
                *(streams_and_leaves(client, i) for i in range(20)),
                *(waits_and_leaves(client, i) for i in range(20)),
            )

    asyncio.run(everybody_leaves())
    wait_for("every worker is at rest", lambda: at_rest(mock), 30)
    wait_for("the router has nothing in flight", lambda: inflight(mock) == 0, 10)
    again = asyncio.run(run_streams(mock.url, [completion("mock", "stay", 20)]))
    assert [s.error for s in again] == [""]
    assert again[0].tokens == expected[0].tokens


def at_rest(service: Service) -> bool:
    """Whether no worker holds a request, nor a lease or a block for one."""
    workers = [p for p in service.pods() if p["metadata"]["labels"]["tandem.dev/role"] != "router"]
    assert len(workers) == 2
    assert all(map(is_ready, workers))
    states = [service.worker_state(pod) for pod in workers]
    held = [
        {
            "running": state["load"]["num_running"],
            "waiting": state["load"]["num_waiting"],
            "leases": state["leases"],
            **{kind: state["ledger"][kind] for kind in ("owned", "leased", "leaked")},
        }
        for state in states
    ]
    return all(one == AT_REST for one in held)


def inflight(service: Service) -> float:
    """The number of requests that the router is working on."""
    lines = service.router_metrics().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("tandem_inflight{"))
