"""`tandem chat`, and the one question that `tandem up` asks."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tandem_cli.console import console
from tandem_cli.errors import CliError, NotRunning
from tandem_cli.target import find_target, find_url

if TYPE_CHECKING:
    from tandem_local import Cluster


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible base URL (without /v1) and the model served there."""

    url: str
    model: str


@dataclass(frozen=True)
class Answer:
    """A completion, and which workers made it according to the router."""

    text: str
    decode_worker: str
    prefill_worker: str
    kv_bytes: int


@contextmanager
def find_endpoint(
    cluster: str, kubeconfig: Path | None, service: str, namespace: str, url: str
) -> Iterator[Endpoint]:
    """The given URL, or the service's own; a port-forward lives as long as the block."""
    if url:
        base = url.rstrip("/").removesuffix("/v1")
        yield Endpoint(base, _first_model(base))
        return
    with find_service_endpoint(find_target(cluster, kubeconfig), service, namespace) as endpoint:
        yield endpoint


@contextmanager
def find_service_endpoint(target: "Cluster", name: str, namespace: str) -> Iterator[Endpoint]:
    """A URL that works on this machine: the service's own, if it has one, else a port-forward."""
    found = target.kubectl("get", "service", name, "-n", namespace, "-o", "json", check=False)
    if found.returncode:
        raise NotRunning(
            f"there is no service {name!r} in namespace {namespace!r}",
            "see `tandem status` for what runs",
        )
    shown = json.loads(found.stdout)
    if base := find_url(target, shown):
        yield Endpoint(base, _first_model(base))
        return
    with _forward(target, name, namespace, shown["spec"]["ports"][0]["port"]) as base:
        yield Endpoint(base, _first_model(base))


@contextmanager
def _forward(target: "Cluster", name: str, namespace: str, port: int) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        local = probe.getsockname()[1]
    command = target.kubectl_argv(
        "port-forward", "-n", namespace, f"service/{name}", f"{local}:{port}"
    )
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=target.environment())
    try:
        yield f"http://127.0.0.1:{local}"
    finally:
        process.terminate()
        process.wait()


def _first_model(base: str, patience: float = 30.0) -> str:
    """The model at an endpoint; waits while the endpoint comes up."""
    deadline = time.monotonic() + patience
    while True:
        try:
            reply = httpx.get(f"{base}/v1/models", timeout=10)
            reply.raise_for_status()
            model: str = reply.json()["data"][0]["id"]
            return model
        except (httpx.HTTPError, IndexError) as error:
            if time.monotonic() > deadline:
                raise CliError(
                    f"{base} does not answer /v1/models: {error}",
                    "check the routers with `tandem status` and `tandem logs NAME --role router`",
                ) from error
            time.sleep(0.2)


def ask_once(endpoint: Endpoint, prompt: str, max_tokens: int) -> Answer:
    """One greedy completion, with the workers that served it."""
    body = {
        "model": endpoint.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    reply = httpx.post(f"{endpoint.url}/v1/completions", json=body, timeout=120)
    if reply.is_error:
        raise CliError(f"the router answered {reply.status_code}: {reply.text}")
    data = reply.json()
    told: dict[str, Any] = data.get("tandem", {})
    return Answer(
        text=data["choices"][0]["text"],
        decode_worker=told.get("decode_worker", ""),
        prefill_worker=told.get("prefill_worker", ""),
        kv_bytes=told.get("kv_bytes", 0),
    )


class Conversation:
    """A chat at the terminal: reads lines, streams answers, keeps the history."""

    def __init__(
        self, endpoint: Endpoint, max_tokens: int, temperature: float, complete: bool
    ) -> None:
        self._endpoint = endpoint
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._complete = complete
        self._messages: list[dict[str, str]] = []

    def run(self) -> None:
        """Until end of input or /quit; /clear forgets the history."""
        console.print(
            f"[bold]{self._endpoint.model}[/] at {self._endpoint.url}  [dim](/clear, /quit)[/]"
        )
        while True:
            try:
                line = console.input("[bold green]>[/] ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line == "/quit":
                return
            if line == "/clear":
                self._messages.clear()
            elif line:
                self.ask(line)

    def ask(self, line: str) -> str:
        """Stream the answer to `line`; Ctrl-C stops it and keeps what has arrived."""
        self._messages.append({"role": "user", "content": line})
        text = ""
        try:
            for piece in self._stream(line):
                print(piece, end="", flush=True)
                text += piece
        except KeyboardInterrupt:
            console.print(" [dim](stopped)[/]", end="")
        print()
        self._messages.append({"role": "assistant", "content": text})
        return text

    def _stream(self, line: str) -> Iterator[str]:
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "max_tokens": self._max_tokens,
            "temperature": self._temperature,
            "stream": True,
        }
        if self._complete:
            path, body["prompt"] = "/v1/completions", line
        else:
            path, body["messages"] = "/v1/chat/completions", self._messages
        with httpx.stream("POST", self._endpoint.url + path, json=body, timeout=None) as reply:
            if reply.is_error:
                reply.read()
                raise CliError(f"the router answered {reply.status_code}: {reply.text}")
            for event in reply.iter_lines():
                if not event.startswith("data: ") or event == "data: [DONE]":
                    continue
                for choice in json.loads(event[6:]).get("choices", []):
                    yield choice.get("text") or choice.get("delta", {}).get("content") or ""
