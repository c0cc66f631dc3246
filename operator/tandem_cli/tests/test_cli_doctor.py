"""`tandem doctor` and `tandem probe`: which workers, what runs inside of them, what is shown."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer

from tandem_cli import admin_call, doctor, probe
from tandem_cli.errors import CliError, NotRunning
from tandem_operator.facts.worker import WorkerPod, WorkerPorts
from tandem_operator.pair import Role
from tandem_operator.tests.facts import make_pod

WELL = {"ok": True, "checks": [{"name": "gpu", "subject": "-", "verdict": "ok", "finding": "2",
                                "remedy": ""}]}  # fmt: skip
MOVED = {
    "ok": True,
    "transport": "tcp",
    "bytes": 2_000_000,
    "seconds": 0.004,
    "megabytesPerSecond": 500.4,
    "latencySeconds": 0.0012,
    "sendSeconds": 0.003,
    "landSeconds": 0.002,
    "slow": ["shm would be better than tcp, but TANDEM_SHM_DIR is not set"],
    "error": "",
}
Inside = Callable[..., subprocess.CompletedProcess[str]]


class FakeTarget:
    """A cluster with these pods, in which `kubectl exec` does what the test says."""

    def __init__(self, pods: list[dict[str, Any]], inside: Inside) -> None:
        self._pods = pods
        self._inside = inside

    def kubectl(self, *args: str, **_: Any) -> subprocess.CompletedProcess[str]:
        if args[:2] == ("get", "pods"):
            return done(json.dumps({"items": self._pods}))
        assert args[0] == "exec"
        return self._inside(args[3], args[args.index("--") + 1 :])


def done(stdout: str, code: int = 0, stderr: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, stdout, stderr)


def pod(
    name: str, role: str, *, started: bool = True, args: tuple[str, ...] = ()
) -> dict[str, Any]:
    state = {"running": {}} if started else {"waiting": {"reason": "ContainerCreating"}}
    return {
        "metadata": {
            "name": name,
            "uid": name,
            "labels": {"tandem.dev/role": role},
            "annotations": {"tandem.dev/http-port": "20001", "tandem.dev/bootstrap-port": "20003"},
        },
        "spec": {"nodeName": f"n-{name}", "containers": [{"name": "engine", "args": list(args)}]},
        "status": {
            "podIP": "10.0.0.7",
            "containerStatuses": [{"name": "engine", "state": state}],
        },
    }


PODS = [pod("d", "decode"), pod("p", "prefill", args=("--transfer", "Shm"))]


def use(monkeypatch: pytest.MonkeyPatch, pods: list[dict[str, Any]], inside: Inside) -> None:
    target = FakeTarget(pods, inside)
    for module in (doctor, probe):
        monkeypatch.setattr(module, "find_target", lambda *_: target)


def test_every_worker_is_examined_for_its_own_transport(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {}

    def inside(name: str, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        asked[name] = command
        return done(json.dumps(WELL))

    use(monkeypatch, [*PODS, pod("starts", "decode", started=False)], inside)
    doctor.examine_workers("c", None, "s", "n", "json")
    assert list(asked) == ["p", "d"], "prefill first, and none that doesn't run"
    assert asked["p"] == ("tandem", "doctor", "-o", "json", "--transfer=Shm")
    assert asked["d"][-1] == "--transfer=Auto"
    shown = json.loads(capsys.readouterr().out)
    assert shown["p"] == {"node": "n-p", **WELL}


def test_a_failed_check_in_one_pod_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def inside(name: str, _: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        if name == "p":
            return done(json.dumps(WELL))
        return done("", 126, "tandem: executable file not found in $PATH")

    use(monkeypatch, PODS, inside)
    with pytest.raises(typer.Exit) as ended:
        doctor.examine_workers("c", None, "s", "n", "json")
    assert ended.value.exit_code == 1
    (check,) = json.loads(capsys.readouterr().out)["d"]["checks"]
    assert check["finding"].endswith("not found in $PATH")
    assert check["remedy"]


def test_a_service_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, [], lambda *_: done(""))
    with pytest.raises(NotRunning, match="no worker of 's' runs"):
        doctor.examine_workers("c", None, "s", "n", "json")


def test_this_machine_is_examined_and_its_faults_are_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.examine_here("Auto", "json")
    names = {check["name"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {"gpu", "rdma", "memlock", "library"} <= names
    monkeypatch.setenv("TANDEM_SHM_DIR", "/no/such/folder")
    with pytest.raises(typer.Exit):
        doctor.examine_here("Auto", "json")


def test_a_probe_is_asked_inside_of_who_receives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def inside(name: str, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        asked.append((name, command))
        return done(json.dumps(MOVED))

    use(monkeypatch, PODS, inside)
    probe.probe_service("c", None, "s", "", "", "n", 8, "json")
    ((name, command),) = asked
    assert name == "d"
    assert command[:3] == ("python", "-m", "tandem_cli.admin_call")
    assert command[3] == "http://127.0.0.1:20001/admin/probe"
    assert json.loads(command[5]) == {"host": "10.0.0.7", "port": 20003, "num_blocks": 8}
    (answer,) = json.loads(capsys.readouterr().out)
    assert (answer["from"], answer["toNode"], answer["transport"]) == ("p", "n-d", "tcp")
    probe.probe_service("c", None, "s", "d", "p", "n", 8, "json")
    assert asked[1][0] == "p", "any worker can send to any other"
    capsys.readouterr()
    probe.probe_service("c", None, "s", "p", "d", "n", 8, "table")
    shown = capsys.readouterr().out
    for text in ("tcp", "500", "1.20 ms", "2 MB in 4.00 ms", "shm would be better than tcp"):
        assert text in shown


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        (done(json.dumps({**MOVED, "ok": False, "error": "checksum"})), "checksum"),
        (done(json.dumps({"error": {"message": "the admin token is wrong"}})), "token is wrong"),
        (done("", 1, "Traceback\nOSError: no token"), "OSError: no token"),
    ],
)
def test_a_probe_that_fails_says_why(
    printed: subprocess.CompletedProcess[str],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(monkeypatch, PODS, lambda *_: printed)
    with pytest.raises(typer.Exit):
        probe.probe_service("c", None, "s", "", "", "n", 8, "table")
    assert error in capsys.readouterr().out


def workers() -> list[WorkerPod]:
    return [
        make_pod(name, role=role, node=node, ports=WorkerPorts())
        for name, role, node in (
            ("p1", Role.PREFILL, "a"),
            ("p2", Role.PREFILL, "a"),
            ("p3", Role.PREFILL, "b"),
            ("d1", Role.DECODE, "a"),
            ("d2", Role.DECODE, "c"),
        )
    ]


@pytest.mark.parametrize(
    ("sender", "receiver", "chosen"),
    [
        ("", "", ["p1 d1", "p1 d2", "p3 d1", "p3 d2"]),
        ("p2", "", ["p2 d1", "p2 d2"]),
        ("d1", "", ["d1 d2"]),
        ("p1", "p3", ["p1 p3"]),
    ],
)
def test_one_pair_of_each_pair_of_nodes(sender: str, receiver: str, chosen: list[str]) -> None:
    pairs = probe.choose_pairs(workers(), sender, receiver)
    assert [f"{one.name} {other.name}" for one, other in pairs] == chosen


@pytest.mark.parametrize(
    ("sender", "receiver", "said"),
    [("x", "", "no running worker 'x'"), ("p1", "p1", "itself"), ("d2", "", "no prefill worker")],
)
def test_a_pair_that_can_not_be(sender: str, receiver: str, said: str) -> None:
    known = workers() if sender != "d2" else workers()[-1:]
    with pytest.raises(CliError, match=said) as refused:
        probe.choose_pairs(known, sender, receiver)
    assert refused.value.remedy


def test_the_call_inside_sends_the_token_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, str] = {}

    class Worker(BaseHTTPRequestHandler):
        """Takes one call."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.update(token=self.headers["authorization"], body=body.decode(), path=self.path)
            self.send_response(502)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    (tmp_path / "token").write_text("sesame\n")
    with HTTPServer(("127.0.0.1", 0), Worker) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/admin/probe"
        monkeypatch.setattr(
            sys, "argv", ["admin_call", url, str(tmp_path / "token"), '{"port": 1}']
        )
        admin_call.main()
        thread.join()
    assert seen == {"token": "Bearer sesame", "body": '{"port": 1}', "path": "/admin/probe"}
    assert capsys.readouterr().out == "{}\n"
    with pytest.raises(SystemExit, match="does not answer"):
        admin_call.main()
