"""The workers' HTTP, with workers that answer, refuse, and stay silent."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tandem_operator.clients.workers import WorkerClient, read_state


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


@pytest.mark.parametrize("answer", [(500, {}), (200, "text"), (200, ["list"])])
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
        {"ok": True, "transport": "tcp", "bytes": 1000, "seconds": 0.5, "error": ""},
    )
    result = await api.probe("127.0.0.1", worker.port, "secret", {})
    assert (result.transport, result.num_bytes, result.seconds) == ("tcp", 1000, 0.5)
    assert not result.error
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
