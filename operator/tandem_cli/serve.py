"""`tandem serve`: a router and workers as plain processes, without Kubernetes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import httpx

from tandem_cli.console import console
from tandem_cli.errors import CliError

PAUSE_S = 0.1
# From SIGTERM to SIGKILL.
STOP_S = 15.0
# From SIGKILL to the end.
KILL_S = 3.0


def model_name(uri: str) -> str:
    """A served name from a model URI: its last part without suffix."""
    tail = re.split(r"://|[/:]", uri.rstrip("/"))[-1].split("?")[0]
    return tail.removesuffix(".gguf").lower() or "model"


class Stopped(Exception):
    """A signal has asked `serve` to end."""


@dataclass
class Fleet:
    """The processes of one `serve`; all end together.

    Each leads a process group, to which its own children belong. Signals only count here, and the
    waits look at the count, so that none can come between the start of a process and its record.
    """

    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    num_signals: int = 0

    def catch_signals(self) -> None:
        """From now on SIGINT, SIGTERM and SIGHUP end `serve` in order; a second one at once."""

        def count(number: int, frame: FrameType | None) -> None:
            self.num_signals += 1

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, count)

    def pause(self) -> None:
        """Wait a moment. Raises Stopped after a signal."""
        if not self.num_signals:
            time.sleep(PAUSE_S)
        if self.num_signals:
            raise Stopped

    def start(
        self,
        command: list[str],
        on_line: Callable[[str], None],
        environ: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a process whose output lines go to `on_line` (in a thread).

        Raises Stopped after a signal.
        """
        if self.num_signals:
            raise Stopped
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            env={**os.environ, **(environ or {})},
            # The terminal's Ctrl-C is for `serve`, which then ends them in order.
            start_new_session=True,
        )
        self.processes.append(process)

        def pump() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                on_line(line.rstrip("\n"))

        threading.Thread(target=pump, daemon=True).start()
        return process

    def stop(self) -> None:
        """Stop all: SIGTERM in reverse order, then SIGKILL; one more signal hurries."""
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
        hurry = self.num_signals + 1
        self._wait_gone(STOP_S, lambda: self.num_signals >= hurry)
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        # Orphans are gone when the system's first process has collected them.
        self._wait_gone(KILL_S, lambda: False)

    def _wait_gone(self, seconds: float, enough: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not enough():
            if not any(process.poll() is None or _has_group(process) for process in self.processes):
                return
            time.sleep(PAUSE_S)


def _has_group(process: subprocess.Popen[str]) -> bool:
    """Whether anything is left of the process group that a process leads."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def serve_model(
    model: str, host: str, port: int, name: str, prefill: int, worker_options: list[str]
) -> None:
    """Run until a signal, or until one of the processes ends (CliError with its last line)."""
    name = name or model_name(model)
    fleet = Fleet()
    fleet.catch_signals()
    try:
        roles = ["prefill"] * prefill + ["decode" if prefill else "both"]
        workers = [
            _start_worker(fleet, model, name, role, worker_options, environ)
            for role, environ in zip(roles, divide_gpus(len(roles)), strict=True)
        ]
        wires = [wait_for_port() for wait_for_port in workers]
        command = [script("tandem-router"), "--model-name", name, "--model", model]
        command += ["--host", host, "--port", str(port)]
        for wire in wires:
            command += ["--worker", f"127.0.0.1:{wire}"]
        router = fleet.start(command, _print_router_line)
        base = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        _wait_until_ready(fleet, base)
        console.print(f"[bold green]ready[/]: {base}/v1  model [bold]{name}[/]")
        console.print(f"try: tandem chat --url {base}    Ctrl-C stops everything")
        while router.poll() is None:
            fleet.pause()
        raise CliError(
            f"the router ended with exit code {router.returncode}", "its last lines above show why"
        )
    except Stopped:
        console.print("[dim]draining …[/]")
    finally:
        fleet.stop()


def script(name: str) -> str:
    """The console script next to this interpreter."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise CliError(f"{name} is not installed next to {sys.executable}", "run `make install`")
    return str(path)


def visible_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """The GPUs that a worker could use: those in CUDA_VISIBLE_DEVICES, or all of the machine."""
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [part.strip() for part in visible.split(",") if part.strip()]
    nodes = (re.fullmatch(r"nvidia(\d+)", path.name) for path in devices.glob("nvidia*"))
    return [str(number) for number in sorted(int(node[1]) for node in nodes if node)]


def divide_gpus(num_workers: int) -> list[dict[str, str]]:
    """Each worker's environment: its own GPUs if there are enough, else all of them."""
    gpus = visible_gpus(os.environ)
    each = len(gpus) // num_workers
    if num_workers == 1 or not each:
        return [{} for _ in range(num_workers)]
    parts = [gpus[number * each : (number + 1) * each] for number in range(num_workers)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]


def _start_worker(
    fleet: Fleet,
    model: str,
    name: str,
    role: str,
    options: list[str],
    environ: Mapping[str, str],
) -> Callable[[], int]:
    """Start one worker; the returned call waits until the worker has reported its wire port."""
    told: dict[str, int] = {}
    listening = threading.Event()

    def on_line(line: str) -> None:
        if not listening.is_set() and '"listening"' in line:
            told.update(json.loads(line[line.index("{") :]))
            listening.set()
            _print_line(f"{role} worker: http://127.0.0.1:{told['http']}/state, /metrics")
        else:
            _print_line(line)

    os.environ.setdefault("POD_IP", "127.0.0.1")
    command = [script("tandem-worker"), "--model", model, "--served-model-name", name]
    command += ["--role", role, "--http-port", "0", "--wire-port", "0", "--bootstrap-port", "0"]
    process = fleet.start(command + options, on_line, environ)

    def wire_port() -> int:
        while not listening.is_set():
            fleet.pause()
            if process.poll() is not None:
                raise CliError(
                    f"the {role} worker ended with exit code {process.returncode}",
                    "its last lines above show why",
                )
        return told["wire"]

    return wire_port


def _wait_until_ready(fleet: Fleet, base: str) -> None:
    while True:
        for process in fleet.processes:
            if process.poll() is not None:
                raise CliError(
                    f"{Path(str(process.args[0])).name} ended with exit code {process.returncode}",  # type: ignore[index]
                    "its last lines above show why",
                )
        try:
            if httpx.get(f"{base}/ready", timeout=1).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        fleet.pause()


def _print_router_line(line: str) -> None:
    """A router's line; after the one that says it serves, where its metrics are."""
    _print_line(line)
    if '"serving"' in line:
        port = json.loads(line)["metrics_port"]
        _print_line(f"router: http://127.0.0.1:{port}/state, /metrics")


def _print_line(line: str) -> None:
    console.print(line, markup=False, soft_wrap=True, style="dim")
