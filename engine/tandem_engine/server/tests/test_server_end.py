"""The ways in which a server ends, with a scripted core."""

import os
import signal

import pytest

from tandem_engine.errors import CoreDiedError
from tandem_engine.frames import (
    CoreFailed,
    SetMode,
)
from tandem_engine.server import worker as worker_module
from tandem_engine.server.tests.processes import until
from tandem_engine.server.tests.stage import Stage


@pytest.mark.parametrize(
    "end", [CoreFailed("out of memory"), CoreDiedError("the core ended: signal 9")]
)
async def test_death_of_the_core(
    stage: Stage, end: CoreFailed | CoreDiedError, capsys: pytest.CaptureFixture[str]
) -> None:
    await stage.ready()
    client = await stage.router()
    stage.core.say(end)
    assert await stage.task == 1
    reason = end.message if isinstance(end, CoreFailed) else str(end)
    captured = capsys.readouterr()
    assert reason in (captured.err + captured.out).strip().splitlines()[-1]
    assert stage.core.closed
    await client.connection.wait_closed()
    await client.close()


async def test_sigterm_waits_for_streams_and_leases(stage: Stage) -> None:
    await stage.ready()
    stage.core.report(num_running=1, num_leases=1)
    client = await stage.router()
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: stage.core.got(SetMode), "the drain")
    await until(lambda: client.state and client.state.draining, "the mark")
    assert (await stage.http("POST", "/admin/undrain")).status_code == 409
    stage.core.report(num_running=0)
    await until(lambda: client.state and client.state.num_running == 0, "the stream's end")
    assert not stage.task.done()
    stage.core.report(num_leases=0)
    assert await stage.task == 0
    await client.close()


async def test_sigterm_while_loading_ends_at_once(stage: Stage) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert await stage.task == 0


async def test_second_sigterm_moves_streams_at_once(stage: Stage) -> None:
    await stage.ready()
    stage.core.report(num_running=1)
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: stage.core.got(SetMode), "the drain")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await stage.task == 0
    assert stage.core.received[-1] == SetMode(draining=True, move_streams=True)


async def test_the_drain_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "MOVE_SECONDS", 0.01)
    stage = Stage("--drain-seconds", "0")
    await until(lambda: stage.told, "the ports")
    await stage.ready()
    stage.core.report(num_running=1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await stage.task == 0
    assert stage.core.received[-1] == SetMode(draining=True, move_streams=True)


@pytest.mark.parametrize("name", ["http", "wire"])
async def test_a_port_in_use_is_named_with_its_flag_and_the_remedy(name: str) -> None:
    stage = Stage()
    await until(lambda: stage.told, "the ports")
    other = Stage(f"--{name}-port", str(stage.ports[name]))
    with pytest.raises(OSError, match=rf"--{name}-port \d+ .*in use.*; use a free port"):
        await other.task
    await stage.stop()
