"""The server with a scripted core: greeting, routing of frames, HTTP."""

import asyncio
import os
from pathlib import Path as FilePath

import msgspec
import pytest
from starlette.routing import Route

from tandem_engine.frames import (
    CoreLoading,
    CoreRefused,
    CoreStats,
    CoreStep,
    HeldPush,
    LeaseQuery,
    LeaseReport,
    Pairing,
    ProbeRequest,
    ProbeResult,
    RoutedItems,
    RoutedSubmit,
    RouterGone,
    SetMode,
)
from tandem_engine.server.api import LeasesAnswer, Path, StateAnswer
from tandem_engine.server.tests.processes import until
from tandem_engine.server.tests.stage import Stage
from tandem_wire.errors import ConnectionLost
from tandem_wire.messages import (
    Cancel,
    Hello,
    KvEvents,
    Ping,
    Refused,
    StepItem,
    Submit,
    WorkerState,
)


def method_of(path: Path) -> str:
    """What changes something is a POST, and a probe moves pages."""
    return "POST" if path.startswith("/admin/") and path is not Path.LEASES else "GET"


async def test_frames_find_their_router(stage: Stage) -> None:
    await stage.ready()
    one, two = await stage.router(), await stage.router()
    assert one.welcome is not None
    assert (one.welcome.worker_id, one.welcome.bootstrap_port) == ("w", 8998)
    one.submit("a", [1, 2])
    two.submit("b", [3])
    await until(lambda: len(stage.core.received) == 2, "the submits")
    numbers = {
        message.submit.rid: message.router
        for message in stage.core.received
        if isinstance(message, RoutedSubmit)
    }
    assert (await stage.http("GET", "/state")).json()["running"] == ["a", "b"]
    stage.core.say(
        CoreStep(
            [
                RoutedItems(numbers["a"], [StepItem("a", [5])]),
                RoutedItems(numbers["b"], [StepItem("b", [6], finish="stop")]),
                RoutedItems(99, [StepItem("c", [7])]),
            ]
        ),
        CoreRefused(numbers["a"], Refused("a", "no_room", "full")),
        CoreRefused(99, Refused("c", "no_room", "full")),
    )
    await until(lambda: "a" in one.refused and "b" in two.finish, "the answers")
    assert (one.tokens, two.tokens) == ({"a": [5]}, {"b": [6]})
    assert (await stage.http("GET", "/state")).json()["running"] == []
    one.cancel("a")
    one.connection.send(Ping(3))
    await until(lambda: one.pongs == [3] and stage.core.got(Cancel), "ping and cancel")
    await one.close()
    await until(lambda: stage.core.got(RouterGone), "the news that the router is gone")
    assert stage.core.got(RouterGone).router == numbers["a"]
    await two.close()


async def test_a_late_router_learns_of_cached_blocks(stage: Stage) -> None:
    await stage.ready()
    early = await stage.router()
    stage.core.say(KvEvents(1, stored=[10, 11, 12]), KvEvents(2, stored=[13], removed=[11]))
    await until(lambda: len(early.kv) == 3, "the events")
    late = await stage.router()
    await until(lambda: late.kv, "the snapshot")
    assert (late.kv[0].sequence, late.kv[0].cleared) == (2, True)
    assert sorted(late.kv[0].stored) == [10, 12, 13]
    stage.core.say(KvEvents(3, cleared=True, stored=[1]))
    last = await stage.router()
    await until(lambda: last.kv and last.kv[0].stored == [1], "the cleared snapshot")
    stage.core.report(num_running=3)
    await until(lambda: early.state and early.state.num_running == 3, "the load")
    for client in (early, late, last):
        await client.close()


async def test_strangers_are_refused(stage: Stage) -> None:
    connection = await stage.raw()
    connection.send(Hello("too-early"))
    refused = await connection.receive()
    assert isinstance(refused, Refused)
    assert (refused.code, refused.rid) == ("no_room", "")
    assert "loading" in refused.message
    await stage.ready()
    for first, message in ((Ping(1), "hello"), (Hello("r", protocol=9), "not 9")):
        connection = await stage.raw()
        connection.send(first)
        refused = await connection.receive()
        assert isinstance(refused, Refused)
        assert (refused.code, refused.rid) == ("protocol", "")
        assert message in refused.message
        with pytest.raises(ConnectionLost):
            await connection.receive()
    client = await stage.router()
    client.connection.send(Hello("again"))
    await until(lambda: "" in client.refused, "the refusal of a second hello")
    await client.close()


async def test_readiness_follows_loading_and_drain(stage: Stage) -> None:
    assert (await stage.http("GET", "/health")).status_code == 200
    stage.core.say(CoreLoading("weights", 0.4))

    async def reason() -> bool:
        answer = await stage.http("GET", "/ready")
        return answer.status_code == 503 and "weights (40%)" in answer.text

    await until(reason, "the reason")
    assert (await stage.http("POST", "/admin/drain")).status_code == 503
    assert (await stage.http("GET", "/state")).json()["startup"] is None
    await stage.ready()
    assert (await stage.http("GET", "/state")).json()["startup"] == {
        "seconds": 2.5,
        "stages": {"import": 2.0, "weights": 0.5},
        "num_weight_bytes": 10**9,
    }
    assert (await stage.http("GET", "/ready")).json() == {"ready": True}
    answer = await stage.http("POST", "/admin/drain", json={"move_streams": True})
    assert answer.json()["draining"] is True
    assert stage.core.got(SetMode).move_streams
    assert (await stage.http("GET", "/ready")).json() == {"ready": False, "reason": "draining"}
    answer = await stage.http("POST", "/admin/undrain")
    assert answer.json()["ready"] is True
    answer = await stage.http("POST", "/admin/role", json={"role": "decode"})
    assert answer.json()["role"] == "decode"


async def test_every_path_of_the_table_is_served_and_no_other(stage: Stage) -> None:
    routes = [route for route in stage.server._admin.app.routes if isinstance(route, Route)]
    assert {route.path for route in routes} == set(Path)
    for path in Path:
        assert (await stage.http(method_of(path), path)).status_code in (200, 503)


async def test_the_state_has_the_fields_of_its_table(stage: Stage) -> None:
    for _ in range(2):
        text = (await stage.http("GET", Path.STATE)).text
        assert set(msgspec.json.decode(text)) == set(StateAnswer.__struct_fields__)
        state = msgspec.json.decode(text, type=StateAnswer)
        assert (state.pid, state.ports["wire"]) == (os.getpid(), stage.ports["wire"])
        await stage.ready()
    assert (state.core_pid, state.compatibility_hash) == (stage.core.pid, "beef")


async def test_leases_are_what_the_core_says(stage: Stage) -> None:
    assert (await stage.http("GET", Path.LEASES)).status_code == 503
    await stage.ready()
    assert (await stage.http("GET", Path.LEASES, headers={})).status_code == 401
    asked = asyncio.create_task(stage.http("GET", Path.LEASES))
    await until(lambda: stage.core.got(LeaseQuery), "the question")
    push = HeldPush(
        rid="r", epoch=3, worker_id="d", transport="shm", num_bytes=7, state="fencing",
        lease_seconds=-1.5,
    )  # fmt: skip
    stage.core.say(LeaseReport(number=99, blocks={"free": 0}))
    number = stage.core.got(LeaseQuery).number
    stage.core.say(LeaseReport(number=number, blocks={"free": 8}, pushes=[push]))
    answer = msgspec.json.decode((await asked).content, type=LeasesAnswer)
    assert (answer.worker_id, answer.blocks, answer.pushes) == ("w", {"free": 8}, [push])


async def test_a_test_worker_says_which_faults_it_has() -> None:
    for faults in ("", "commit:drop@0.1"):
        stage = Stage(TANDEM_FAULTS=faults, TANDEM_FAULTS_ALLOWED="true")
        try:
            assert (await stage.http("GET", Path.STATE)).json()["faults"] == faults
        finally:
            await stage.stop()


async def test_bad_admin_requests(stage: Stage) -> None:
    await stage.ready()
    for path, body, message in (
        ("/admin/role", b"{", "truncated"),
        ("/admin/role", b"{}", "role"),
        ("/admin/role", b'{"role": "king"}', "prefill, decode, both"),
        ("/admin/drain", b'{"later": 1}', "later"),
        ("/admin/probe", b'{"host": "h"}', "port"),
    ):
        answer = await stage.http("POST", path, content=body)
        error = answer.json()["error"]
        assert answer.status_code == 400, answer.text
        assert error["type"] == "invalid_request_error"
        assert message in error["message"]
    assert (await stage.http("GET", "/admin/drain")).status_code == 405
    assert "nothing at /x" in (await stage.http("GET", "/x")).json()["error"]["message"]


async def test_the_core_may_not_follow(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    await stage.ready()
    monkeypatch.setattr("tandem_engine.server.admin.MODE_SECONDS", 0.01)
    monkeypatch.setattr("tandem_engine.server.admin.PROBE_SECONDS", 0.01)
    monkeypatch.setattr(stage.core, "send", stage.core.received.append)
    answer = await stage.http("POST", "/admin/role", json={"role": "decode"})
    assert answer.status_code == 503
    answer = await stage.http("POST", "/admin/probe", json={"host": "h", "port": 1})
    assert answer.status_code == 504
    stage.core.say(ProbeResult(number=1))  # too late for anyone


async def test_probe(stage: Stage) -> None:
    await stage.ready()
    asked = asyncio.create_task(
        stage.http("POST", "/admin/probe", json={"host": "h", "port": 1, "num_blocks": 3})
    )
    await until(lambda: stage.core.got(ProbeRequest), "the probe")
    request = stage.core.got(ProbeRequest)
    assert (request.host, request.port, request.num_blocks) == ("h", 1, 3)
    stage.core.say(
        ProbeResult(
            number=request.number,
            worker_id="p",
            transport="shm",
            passed_over={"cudaIpc": "no GPU"},
            num_bytes=2_000_000,
            seconds=0.5,
            latency_seconds=0.001,
            send_seconds=0.4,
            land_seconds=0.3,
        )
    )
    body = (await asked).json()
    assert (body["ok"], body["transport"], body["megabytesPerSecond"]) == (True, "shm", 4.0)
    assert body["passedOver"] == {"cudaIpc": "no GPU"}
    assert body["slow"] == ["cudaIpc would be better than shm, but no GPU"]
    assert body["peer"] == "p"
    times = [body[name] for name in ("latencySeconds", "sendSeconds", "landSeconds")]
    assert times == [0.001, 0.4, 0.3]


async def test_the_state_shows_what_moves_kv_and_why(stage: Stage) -> None:
    await stage.ready()
    pairing = Pairing(
        worker_id="p", side="decode", transport="shm", passed_over={"cudaIpc": "no GPU"}
    )
    stage.core.say(CoreStats(state=WorkerState(role="decode"), pairings=[pairing]))

    async def shown() -> bool:
        state = msgspec.json.decode((await stage.http("GET", Path.STATE)).text, type=StateAnswer)
        return state.pairings == [pairing]

    await until(shown, "the pairing")


async def test_the_state_shows_what_is_not_well_here(tmp_path: FilePath) -> None:
    """Of the checks at the start, those that matter to the transport."""
    gone = str(tmp_path / "gone")
    for flags, shown in (((), ["shared memory"]), (("--transfer", "Tcp"), [])):
        stage = Stage(*flags, TANDEM_SHM_DIR=gone)
        await stage.ready()
        state = msgspec.json.decode((await stage.http("GET", Path.STATE)).text, type=StateAnswer)
        found = [check for check in state.checks if check["subject"] == gone]
        assert [check["name"] for check in found] == shown
        assert all(check["verdict"] == "fail" and check["remedy"] for check in found)
        await stage.stop()


async def test_the_token_guards_all_of_admin_and_nothing_else(tmp_path: FilePath) -> None:
    token = tmp_path / "token"
    token.write_text("sésame\n")
    stage = Stage("--admin-token-file", str(token))
    await until(lambda: stage.told, "the ports")
    await stage.ready()
    wrong: tuple[dict[str, str], ...]
    wrong = ({}, {"authorization": "Bearer nö"}, {"authorization": "Basic sésame"})
    for path in Path:
        if not path.startswith("/admin/"):
            assert (await stage.http("GET", path, headers={})).status_code == 200
            continue
        for headers in wrong:
            encoded = {name: value.encode() for name, value in headers.items()}
            answer = await stage.http(method_of(path), path, headers=encoded)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["type"] == "authentication_error"
    assert "sésame" not in (await stage.http("GET", "/state")).text

    async def drain(given: str) -> int:
        headers = {"authorization": f"Bearer {given}".encode()}
        return (await stage.http("POST", "/admin/drain", headers=headers)).status_code

    assert await drain("sésame") == 200
    token.write_text("mellon")  # a mounted file may change
    assert (await drain("sésame"), await drain("mellon")) == (401, 200)
    token.unlink()
    assert await drain("mellon") == 503
    await stage.stop()


async def test_without_a_token_nobody_may_call_admin() -> None:
    stage = Stage("--admin-token-file", "")
    await until(lambda: stage.told, "the ports")
    await stage.ready()
    for headers in ({}, {"authorization": "Bearer x"}):
        answer = await stage.http("POST", "/admin/drain", headers=headers)
        assert answer.status_code == 403
        assert "--admin-token-file" in answer.json()["error"]["message"]
    assert stage.core.got(SetMode) is None
    await stage.stop()


async def test_metrics(stage: Stage) -> None:
    await stage.ready()
    stage.core.say(
        CoreStats(
            state=WorkerState(role="both"),
            counters={
                'kv_transfer_bytes_total{backend="tcp",direction="in"}': 5,
                'kv_transfer_bytes_total{backend="shm",direction="in"}': 7,
                "steps_total": 3,
            },
            gauges={"queue_length": 2},
            observations={"step_seconds": [0.0005, 0.004], "step_batch_size": [1, 30]},
            ledger={"free": 9},
        )
    )
    stage.core.say(
        CoreStats(state=WorkerState(role="both"), observations={"step_seconds": [500.0]})
    )
    stage.core.say(
        CoreStats(state=WorkerState(role="both"), counters={"steps_total": 4}, ledger={"free": 8})
    )

    async def lines() -> list[str]:
        return (await stage.http("GET", "/metrics")).text.splitlines()

    async def there() -> bool:
        return "tandem_steps_total 4.0" in await lines()

    await until(there, "the metrics")
    text = await lines()
    for line in (
        'tandem_kv_ledger_blocks{use="free"} 8.0',
        'tandem_step_seconds_bucket{le="0.001"} 1.0',
        'tandem_step_seconds_bucket{le="0.005"} 2.0',
        'tandem_step_seconds_bucket{le="+Inf"} 3.0',
        'tandem_step_batch_size_bucket{le="32.0"} 2.0',
        "tandem_worker_ready 1.0",
    ):
        assert line in text


async def test_a_deaf_router_is_cut_off(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed send ends that router's connection and no other."""
    await stage.ready()
    client = await stage.router()
    client.submit("a", [1])
    await until(lambda: stage.core.got(RoutedSubmit), "the submit")
    (router,) = stage.server._hub._routers.values()

    def fail(_: object) -> None:
        raise ConnectionLost("full")

    monkeypatch.setattr(router.connection, "send", fail)
    stage.core.say(CoreStep([RoutedItems(router.number, [StepItem("a", [1])])]))
    await until(lambda: stage.core.got(RouterGone), "the cut")
    await client.close()


def test_submit_is_the_routers_message() -> None:
    """Keeps the scripted core honest: what it receives is what the wire carries."""
    assert RoutedSubmit.__struct_fields__ == ("router", "submit")
    assert "rid" in Submit.__struct_fields__
