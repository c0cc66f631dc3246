"""The entry point: flags, exit codes, logs."""

import json
import socket
import sys
from typing import NoReturn

import pytest
import structlog

from tandem_engine import main as main_module
from tandem_engine.config import WorkerConfig
from tandem_engine.core.process import CoreChild
from tandem_engine.server.serving import configure_logs, print_event
from tandem_engine.server.worker import WorkerServer


@pytest.fixture(autouse=True)
def _keep_structlog() -> object:
    yield
    structlog.reset_defaults()


async def unused() -> NoReturn:
    raise AssertionError("no core is wanted here")


def run_main(monkeypatch: pytest.MonkeyPatch, *flags: str) -> object:
    monkeypatch.setattr(sys, "argv", ["tandem-worker", *flags])
    with pytest.raises(SystemExit) as ended:
        main_module.main()
    return ended.value.code


def test_bad_flags_exit_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "--role", "king") == 2
    assert "tandem-worker: " in capsys.readouterr().err


def test_a_core_that_cannot_be_started_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> CoreChild:
        raise OSError("too many processes")

    monkeypatch.setattr(CoreChild, "start", refuse)
    assert run_main(monkeypatch, "--mock", "tiny") == 1
    assert "can't be started: too many processes" in capsys.readouterr().err


def test_a_taken_bootstrap_port_is_told_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*_: object) -> CoreChild:
        raise AssertionError("the core would load the model now")

    monkeypatch.setattr(CoreChild, "start", start)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        flags = ("--mock", "tiny", "--host", "127.0.0.1", "--bootstrap-port", str(port))
        assert run_main(monkeypatch, *flags) == 1
    assert f"--bootstrap-port {port} can't be opened" in capsys.readouterr().err


def test_two_workers_never_share_the_http_port() -> None:
    first = WorkerServer(WorkerConfig(model="mock://tiny", http_port=0), unused, print_event)
    one = first._bind_http()
    config = WorkerConfig(model="mock://tiny", http_port=one.getsockname()[1])
    with one, pytest.raises(OSError, match="--http-port"):
        WorkerServer(config, unused, print_event)._bind_http()


def test_exit_code_is_the_servers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run(server: WorkerServer) -> int:
        return 0 if isinstance(server._config, WorkerConfig) else 3

    async def taken(_: WorkerServer) -> int:
        raise OSError("address already in use")

    monkeypatch.setattr(WorkerServer, "run", run)
    assert run_main(monkeypatch, "--mock", "tiny") == 0
    monkeypatch.setattr(WorkerServer, "run", taken)
    assert run_main(monkeypatch, "--mock", "tiny") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert json.loads(last)["reason"] == "address already in use"


def test_logs_go_to_stderr_and_events_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (True, False):
        configure_logs(json=as_json)
        structlog.get_logger().info("loading", stage="weights")
    print_event({"event": "listening", "http": 1})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"event": "listening", "http": 1}
    assert json.loads(err.splitlines()[0])["stage"] == "weights"
    assert "weights" in err.splitlines()[1]
