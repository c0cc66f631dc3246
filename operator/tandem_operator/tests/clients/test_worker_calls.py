"""The workers' HTTP, with workers that answer, refuse, and stay silent."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tandem_operator.clients.workers import WorkerClient, read_state
from tandem_operator.facts.worker import Links, LinkTrouble


class Worker:
    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        self.seen: list[tuple[str, str, Any]] = []
        self.port = 0

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        self.seen.append((request.path, request.headers.get("Authorization", ""), body))
        status, answer = self.answers.get(request.path, (200, {}))
        if isinstance(answer, str):
            return web.Response(text=answer, status=status)
        return web.json_response(answer, status=status)


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Worker, WorkerClient]]:
    worker = Worker()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", worker.handle)
    server = TestServer(app)
    await server.start_server()
    assert server.port is not None
    worker.port = server.port
    api = WorkerClient()
    yield worker, api
    await api.close()
    await server.close()


async def test_load_is_read(pair: tuple[Worker, WorkerClient]) -> None:
    worker, api = pair
    worker.answers["/state"] = (
        200,
        {"draining": True, "leases": 2, "running": ["a"], "load": {"num_running": 0}},
    )
    state = await api.state("127.0.0.1", worker.port)
    assert state is not None
    assert (state.num_running, state.num_leases, state.draining, state.idle) == (1, 2, True, False)


async def test_links_are_those_of_the_receiving_side(pair: tuple[Worker, WorkerClient]) -> None:
    worker, api = pair
    trouble = {"worker_id": "p", "num_faults": 3, "out_of_use": True, "reason": "checksum"}
    worker.answers["/state"] = (
        200,
        {
            "pairings": [
                {"worker_id": "p", "side": "decode", "transport": "shm"},
                {"worker_id": "d", "side": "prefill", "transport": "tcp"},
            ],
            "troubles": [{**trouble, "address": "10.0.0.1:8998", "transport": "shm"}],
        },
    )
    state = await api.state("127.0.0.1", worker.port)
    assert state is not None
    assert state.links == Links(
        {"p": "shm"}, (LinkTrouble("p", 3, out_of_use=True, reason="checksum"),)
    )
    assert read_state({}).links == Links(), "of an older release"


@pytest.mark.parametrize(
    "answer",
    [(500, {}), (200, "text"), (200, ["list"]), (200, {"troubles": [{"worker_id": "p"}]})],
)
async def test_a_strange_state_is_unknown(pair: tuple[Worker, WorkerClient], answer: Any) -> None:
    worker, api = pair
    worker.answers["/state"] = answer
    assert await api.state("127.0.0.1", worker.port) is None


async def test_calls_carry_the_token(pair: tuple[Worker, WorkerClient]) -> None:
    worker, api = pair
    assert await api.admin("127.0.0.1", worker.port, "drain", "secret", {"move_streams": True})
    assert worker.seen[-1] == ("/admin/drain", "Bearer secret", {"move_streams": True})
    worker.answers["/admin/drain"] = (401, {})
    assert not await api.admin("127.0.0.1", worker.port, "drain", "secret", {})


async def test_a_probe_that_worked(pair: tuple[Worker, WorkerClient]) -> None:
    worker, api = pair
    worker.answers["/admin/probe"] = (
        200,
        {
            "ok": True,
            "transport": "tcp",
            "passedOver": {"cudaIpc": "no GPU", "shm": "another node"},
            "bytes": 1000,
            "seconds": 0.5,
            "latencySeconds": 0.25,
            "error": "",
        },
    )
    result = await api.probe("127.0.0.1", worker.port, "secret", {})
    assert (result.transport, result.num_bytes, result.seconds) == ("tcp", 1000, 0.5)
    assert (result.error, result.latency_seconds) == ("", 0.25)
    assert result.passed_over == "cudaIpc: no GPU; shm: another node"
    assert worker.seen[-1] == ("/admin/probe", "Bearer secret", {})


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((502, {"error": "refused"}), "refused"),
        ((401, "who are you"), "HTTP 401"),
        ((500, {}), "HTTP 500"),
    ],
)
async def test_a_probe_that_failed_is_a_result(
    pair: tuple[Worker, WorkerClient], answer: Any, error: str
) -> None:
    worker, api = pair
    worker.answers["/admin/probe"] = answer
    assert error in (await api.probe("127.0.0.1", worker.port, "secret", {})).error


async def test_a_silent_worker() -> None:
    api = WorkerClient()
    assert await api.state("127.0.0.1", 9) is None
    assert not await api.admin("127.0.0.1", 9, "drain", "secret", {})
    assert (await api.probe("127.0.0.1", 9, "secret", {})).error
    await api.close()


def test_waiting_requests_are_resident_work() -> None:
    state = read_state({"load": {"num_running": 2, "num_waiting": 1}})
    assert state.num_running == 3
    assert state.figures is None
    with pytest.raises(ValueError, match="not an object"):
        read_state([])
    with pytest.raises(ValueError, match="list as load"):
        read_state({"load": ["x"]})
