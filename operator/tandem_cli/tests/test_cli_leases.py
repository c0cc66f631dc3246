"""`tandem debug leases`: one worker by its URL, or all of a service from inside their pods."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tandem_cli import leases
from tandem_cli.errors import CliError
from tandem_cli.main import app
from tandem_cli.tests.test_cli_doctor import FakeTarget, done, pod

HELD: dict[str, Any] = {
    "worker_id": "decode-a",
    "role": "decode",
    "blocks": {"free": 90, "cached": 2, "owned": 0, "leased": 8, "leaked": 0},
    "requests": [
        {"rid": "r-1", "kind": "routed", "state": "fetching", "num_tokens": 120, "num_blocks": 8,
         "leased": True},
    ],
    "fetches": [
        {"rid": "r-1", "epoch": 7, "worker_id": "prefill-a", "transport": "shm",
         "blocks": [1, 2, 3], "num_bytes": 4096, "state": "fencing", "idle_seconds": 2.25},
    ],
    "pushes": [
        {"rid": "r-9", "epoch": 4, "worker_id": "decode-b", "transport": "tcp", "num_bytes": 512,
         "state": "pushing", "lease_seconds": 8.5},
    ],
}  # fmt: skip


class Worker(BaseHTTPRequestHandler):
    """Knows one token and one path."""

    def do_GET(self) -> None:
        allowed = self.headers["Authorization"] == "Bearer secret"
        known = self.path == "/admin/leases"
        self.send_response(200 if allowed and known else 401)
        self.end_headers()
        refusal = {"error": {"message": "the token is another"}}
        self.wfile.write(json.dumps(HELD if allowed and known else refusal).encode())

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture(name="url")
def url_fixture() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Worker) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(name="token")
def token_fixture(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("secret\n")
    return path


def ask(*words: str) -> str:
    result = CliRunner().invoke(app, ["debug", "leases", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_one_worker_by_its_url(
    url: str, token: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ask("--url", url, "--token-file", str(token), "-o", "json")
    assert json.loads(text) == {url: HELD}
    told: list[Any] = []
    monkeypatch.setattr("tandem_cli.leases.results.print", lambda what, **_: told.append(what))
    ask("--url", url, "--token-file", str(token))
    line, table = told
    assert "(decode): 90 free, 2 cached, 0 owned, 8 leased, 0 leaked" in line
    cells = [" ".join(column.cells) for column in table.columns]
    assert cells[1] == "r-1 r-1 r-9"
    assert cells[2] == "fetching fencing pushing"
    assert "8 blocks, pinned" in cells[6]
    assert "lease ends in 8.5 s" in cells[7]


def test_what_can_not_be_asked_says_what_to_give(url: str, token: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("guess")
    for words, message in (
        ([], "name either a service or one worker's --url"),
        (["chat", "--url", url], "name either a service or one worker's --url"),
        (["--url", url], "needs the worker's admin token"),
        (["--url", url, "--token-file", str(wrong)], "401"),
        (["--url", url, "--token-file", str(tmp_path / "none")], "No such file"),
    ):
        with pytest.raises(CliError, match=message):
            ask(*words)


def test_every_worker_of_a_service_from_inside_its_pod(
    url: str, token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that runs in the pods runs here; one pod can't be reached, one has no token."""
    port = url.rpartition(":")[2]
    wrong = tmp_path / "wrong"
    wrong.write_text("guess")
    asked: list[str] = []

    def inside(name: str, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        asked.append(name)
        assert command[0] == "python"
        assert command[-2:] == (
            f"http://127.0.0.1:{port}/admin/leases",
            "/etc/tandem/admin/token",
        )
        if name == "plain":
            return done("", 1, "the container is not running")
        file = token if name == "well" else wrong
        words = [sys.executable, *command[1:-1], str(file)]
        return subprocess.run(words, capture_output=True, text=True, check=True)

    pods = [pod(name, "decode") for name in ("plain", "wrong", "well")]
    for each in pods:
        each["metadata"]["annotations"]["tandem.dev/http-port"] = port
    target = FakeTarget(pods, inside)
    monkeypatch.setattr(leases, "find_target", lambda *_: target)
    found = json.loads(ask("chat", "-n", "prod", "-o", "json"))
    assert found.pop("plain") == {"error": "the container is not running"}
    assert found.pop("wrong") == {"error": "the token is another"}
    assert found == {"well": HELD}
    assert asked == ["plain", "well", "wrong"]
    monkeypatch.setattr(leases, "find_target", lambda *_: FakeTarget([], inside))
    with pytest.raises(CliError, match="no worker of 'other' runs in namespace 'prod'"):
        ask("other", "-n", "prod")
