"""A router, a prefill worker and a decode worker as plain processes, without a cluster."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from deadlines import patience

from tandem_wire.disk_cache import default_cache_dir
from tests.waiting import wait_for

START_SECONDS = 240.0  # of torch, weights (converted at first use) and all three processes at once
# Compiling torch's modules again in each of many workers costs more than the tests themselves.
BYTECODE = {
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONPYCACHEPREFIX": str(default_cache_dir() / "bytecode"),
}


@dataclass
class Process:
    """One console script; its output goes to a file."""

    log: Path
    child: subprocess.Popen[bytes]

    def said(self, event: str) -> dict[str, Any] | None:
        """The JSON line with this event, once there is one. AssertionError if the process ends."""
        text = self.log.read_text()
        assert self.child.poll() is None, f"{self.log.name} ended: {text[-2000:]}"
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and found.get("event") == event:
                    return found
        return None

    def stop(self) -> int:
        """Ask the process to end, or kill it if it doesn't; returns its exit code."""
        self.child.terminate()
        try:
            return self.child.wait(timeout=patience(60))
        except subprocess.TimeoutExpired:
            self.child.kill()
            return self.child.wait()


@dataclass
class Fleet:
    """Workers `p` and `d` behind a router; every prompt goes to `p` first."""

    folder: Path
    model: str
    worker_flags: tuple[str, ...]
    flags_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of one worker alone
    url: str = ""
    monitor: str = ""  # the router's port for metrics
    processes: list[Process] = field(default_factory=list)
    workers: dict[str, str] = field(default_factory=dict)  # name to URL of its admin server

    def _start(self, name: str, module: str, *flags: str) -> Process:
        path = self.folder / f"{name}.log"
        with path.open("wb") as log:
            child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    module,
                    "--model",
                    self.model,
                    "--host",
                    "127.0.0.1",
                    *flags,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **BYTECODE, "POD_NAME": name, "POD_IP": "127.0.0.1"},
            )
        process = Process(path, child)
        self.processes.append(process)
        return process

    def start(self) -> None:
        """Start everything at once and wait until the router reaches both workers."""
        ports = ("--http-port", "0", "--wire-port", "0", "--bootstrap-port", "0")
        both = {
            name: self._start(
                *(name, "tandem_engine.main", *ports, "--role", role),
                # A pause of a loaded machine is not a failure here.
                *("--local-prefill-tokens", "0", "--lease-seconds", "60", *self.worker_flags),
                *self.flags_of.get(name, ()),
            )
            for name, role in (("p", "prefill"), ("d", "decode"))
        }
        wires: list[str] = []
        for name, worker in both.items():
            said = wait_for(f"{name} binds", partial(worker.said, "starting"), START_SECONDS)
            wires += ["--worker", f"127.0.0.1:{said['wire']}"]
            self.workers[name] = f"http://127.0.0.1:{said['http']}"
        router = self._start("router", "tandem_router.main", "--port", "0", *wires)
        said = wait_for("the router serves", partial(router.said, "serving"), START_SECONDS)
        self.url, self.monitor = (
            f"http://127.0.0.1:{said[name]}" for name in ("port", "metrics_port")
        )
        for name, worker in both.items():
            wait_for(f"{name} loads", partial(worker.said, "listening"), START_SECONDS)
        wait_for("the router reaches both workers", self._is_connected, START_SECONDS)

    def _is_connected(self) -> bool:
        state = httpx.get(f"{self.monitor}/state").json()
        return [worker["connected"] for worker in state["workers"]] == [True, True]

    def state_of(self, name: str) -> dict[str, Any]:
        """A worker's report of its own state."""
        body: dict[str, Any] = httpx.get(f"{self.workers[name]}/state").json()
        return body


@contextlib.contextmanager
def running_fleet(
    folder: Path, model: str, *worker_flags: str, **flags_of: tuple[str, ...]
) -> Iterator[Fleet]:
    """A fleet for the duration of a block; afterwards every process must exit with code 0."""
    fleet = Fleet(folder, model, worker_flags, flags_of)
    try:
        fleet.start()
        yield fleet
    finally:
        codes = [process.stop() for process in reversed(fleet.processes)]
    assert codes == [0, 0, 0], f"exit codes of router, d and p: {codes}"
