"""The main job on the real model, as a newcomer meets it.

Aspects: what kubectl shows, explain, logs, exec, port-forward, DNS from another pod; the openai
client; /generate; the same greedy tokens with and without disaggregation.
"""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from deadlines import patience

from tests.service import Service, is_ready
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The three largest cities in France are"


@pytest.fixture(scope="module")
def quickstart(tandem: Any) -> Iterator[Service]:
    manifest = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    with Service.running(tandem, manifest, 300) as service:
        yield service


@pytest.fixture(scope="module")
def client(quickstart: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{quickstart.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_a_prompt_is_answered_through_both_pools(quickstart: Service, model: str) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    reply = httpx.post(f"{quickstart.url}/v1/completions", json=body, timeout=patience(60)).json()
    assert "Paris" in reply["choices"][0]["text"]
    told = reply["tandem"]
    assert told["decode_worker"] in quickstart.pod_names("decode")
    assert told["prefill_worker"] in quickstart.pod_names("prefill")
    assert told["kv_bytes"] > 0


def test_kubectl_shows_the_columns(quickstart: Service) -> None:
    header = quickstart.kubectl("get", "tisvc").splitlines()[0].split()
    assert header[1:] == [
        *("MODEL", "PREFILL", "DECODE", "RATIO", "TTFT", "TBT"),
        *("TRANSPORT", "LINK", "READY", "AGE"),
    ]
    assert quickstart.kubectl("get", "tpool").splitlines()[0].startswith("NAME")
    quickstart.kubectl("wait", "--for=condition=Ready", f"tisvc/{quickstart.name}", "--timeout=5s")
    explained = quickstart.kubectl("explain", "tisvc.spec.kvTransfer")
    assert "bootstrapPort" in explained
    assert "localPrefillTokens" in explained


def test_every_condition_has_a_reason(quickstart: Service) -> None:
    conditions = {c["type"]: c for c in quickstart.get()["status"]["conditions"]}
    assert {
        *("Ready", "Progressing", "Degraded", "PrefillReady", "DecodeReady", "RouterReady"),
        *("ModelReady", "TransportVerified", "ScalingActive", "SLOInfeasible", "MetricsStale"),
        *("CapacityUnavailable", "GatedByPeer"),
    } <= set(conditions)
    assert all(c.get("reason") for c in conditions.values())
    assert conditions["TransportVerified"]["status"] == "True"
    assert quickstart.get()["status"]["transport"]["megabytesPerSecond"] > 0


def test_logs_exec_and_port_forward(quickstart: Service) -> None:
    for role in ("router", "decode", "prefill"):
        pod = quickstart.pod_names(role)[0]
        assert quickstart.kubectl("logs", pod).strip()
        assert quickstart.kubectl("exec", pod, "--", "sh", "-c", "echo $((6*7))").strip() == "42"
    assert_forwarded(quickstart, f"service/{quickstart.name}", 8000)
    assert_forwarded(quickstart, f"pod/{quickstart.pod_names('prefill')[0]}", 8100)


def assert_forwarded(service: Service, target: str, remote: int) -> None:
    """A port that kubectl forwards to the target answers /health."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = service.cluster.kubectl_argv("port-forward", target, f"{port}:{remote}")
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env=service.cluster.environment()
    )
    try:

        def healthy() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
            except httpx.TransportError:
                return False

        wait_for("the forwarded port answers", healthy, 20)
    finally:
        process.terminate()
        process.wait()


def test_the_service_answers_by_its_dns_name(quickstart: Service) -> None:
    pod = quickstart.pod_names("decode")[0]
    script = (
        "import urllib.request as r;"
        f"print(r.urlopen('http://{quickstart.name}.default.svc:8000/health').status)"
    )
    assert quickstart.kubectl("exec", pod, "--", "python3", "-c", script).strip() == "200"


def test_the_openai_client_streams(client: openai.OpenAI, model: str) -> None:
    chat = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Name a color."}],
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(chat)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12 or any(
        c.choices and c.choices[0].finish_reason == "stop" for c in chunks
    )
    pieces = [
        event.choices[0].text
        for event in client.completions.create(
            model=model, prompt=PROMPT, max_tokens=8, temperature=0, stream=True
        )
        if event.choices
    ]
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0)
    assert "".join(pieces) == whole.choices[0].text
    assert len(pieces) > 2


def test_generate(quickstart: Service) -> None:
    body = {"text": "Once upon a time", "max_new_tokens": 32, "temperature": 0.7}
    reply = httpx.post(f"{quickstart.url}/generate", json=body, timeout=patience(60))
    assert reply.status_code == 200
    assert reply.json()["text"]


def test_the_tutorials_requests(quickstart: Service) -> None:
    """docs/pd-tutorial.md: the same greedy text from SGLang's endpoint and from OpenAI's."""
    page = (ROOT / "docs/pd-tutorial.md").read_text()
    texts = []
    for path, body in re.findall(r"8000(/\S+) -H [^\n]*\\\n +-d '([^']*)'", page):
        reply = httpx.post(quickstart.url + path, json=json.loads(body), timeout=patience(60))
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        texts.append(answer["choices"][0]["text"] if "choices" in answer else answer["text"])
    one, other = texts
    assert one == other
    assert one.strip()


def test_aggregated_and_disaggregated_agree(quickstart: Service, model: str) -> None:
    """The same greedy tokens from one worker that does everything as from prefill + decode."""
    prompts = [PROMPT, "Water boils at", "def fibonacci(n):\n", "To be or not to be, that is " * 40]
    decode = next(pod for pod in quickstart.pods("decode") if is_ready(pod))

    def tokens(url: str, salt: str, *, moved: bool) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            body = {
                **{"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0},
                # Neither may reuse the other's cached blocks.
                **{"return_token_ids": True, "ignore_eos": True, "cache_salt": salt},
            }
            reply = httpx.post(f"{url}/v1/completions", json=body, timeout=patience(120)).json()
            assert (reply["tandem"]["kv_bytes"] > 0) == moved
            answers.append(reply["choices"][0]["token_ids"])
        return answers

    both = tokens(quickstart.url, "together", moved=True)
    with aggregated_router(decode, model) as url:
        assert tokens(url, "alone", moved=False) == both


class aggregated_router:  # noqa: N801
    """A separate router that knows only one decode worker, which must then prefill by itself."""

    def __init__(self, pod: dict[str, Any], model: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        binary = Path(sys.executable).with_name("tandem-router")
        uri = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())["spec"]["model"]
        self._command = [str(binary), "--model-name", model, "--model", uri["uri"]]
        self._command += ["--host", "127.0.0.1", "--port", str(port)]
        self._command += ["--worker", f"{pod['status']['podIP']}:8101"]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(self._command)

        def ready() -> bool:
            try:
                return httpx.get(f"{self.url}/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_for("the second router is ready", ready, 60)
        return self.url

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
