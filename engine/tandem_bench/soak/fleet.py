"""The soak's processes: a router, and workers that come back whenever they die."""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import httpx

from tandem_bench.errors import EngineError

START_SECONDS: Final = 240.0
RETRY_SECONDS: Final = 0.3
MODEL_NAME: Final = "soak"
BUGS: Final = ("CorruptKVError", "LedgerError", "the hand-off thread died", "Traceback")
"""What a worker logs when one of its own invariants is broken."""
ENDS: Final = "the worker ends"
"""The last line of a worker that ends by itself."""
KILLED: Final = "signal 9"
"""Why it may: its core was killed."""

Blow = Literal["worker", "core", "server", "freeze"]
"""Whom a blow strikes: both processes, one of them; or a pause of both."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def last_line(log: Path) -> str:
    """What a process wrote last. Its log goes with the fleet's folder."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return lines[-1][:300] if lines else "(nothing)"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetting:
    """What all workers of a fleet have in common."""

    model: str
    transfer: str
    lease_seconds: float
    faults: str
    folder: Path  # logs, the shared memory's files, the token
    flags: tuple[str, ...] = ()


@dataclass
class Worker:
    """A worker with ports that it keeps over its lives; it is started again when it ends."""

    name: str
    role: str
    setting: WorkerSetting
    ports: list[int] = field(default_factory=lambda: free_ports(3))
    num_starts: int = 0
    counters: dict[str, dict[str, float]] = field(default_factory=dict)  # by boot
    _process: asyncio.subprocess.Process | None = None
    _task: asyncio.Task[None] | None = None
    _core_pid: int = 0

    @property
    def url(self) -> str:
        """Of its admin server."""
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def log(self) -> Path:
        """What all its lives have written."""
        return self.setting.folder / f"{self.name}.log"

    def start(self) -> None:
        """Begin to keep it alive."""
        self._task = asyncio.create_task(self._keep_alive())

    async def _keep_alive(self) -> None:
        setting = self.setting
        http, wire, bootstrap = map(str, self.ports)
        command = [sys.executable, "-m", "tandem_engine.main", "--model", setting.model]
        command += ["--host", "127.0.0.1", "--role", self.role, "--transfer", setting.transfer]
        command += ["--served-model-name", MODEL_NAME]
        command += ["--http-port", http, "--wire-port", wire, "--bootstrap-port", bootstrap]
        command += ["--lease-seconds", f"{setting.lease_seconds:g}"]
        command += ["--local-prefill-tokens", "0", "--page-size", "16", "--chunk-tokens", "64"]
        command += ["--admin-token-file", str(setting.folder / "token"), *setting.flags]
        environ = {**os.environ, "POD_NAME": self.name, "POD_IP": "127.0.0.1"}
        environ |= {"TANDEM_SHM_DIR": str(setting.folder / "shm")}
        if setting.faults:
            environ |= {"TANDEM_FAULTS": setting.faults, "TANDEM_FAULTS_ALLOWED": "true"}
        with self.log.open("ab") as log:
            while True:
                self.num_starts += 1
                self._process = await asyncio.create_subprocess_exec(
                    *command, stdout=log, stderr=log, env=environ, start_new_session=True
                )
                await self._process.wait()
                # A core that has lost its server ends by itself, and has the port until then.
                await asyncio.sleep(RETRY_SECONDS)

    async def look(self, client: httpx.AsyncClient) -> dict[str, Any] | None:
        """Its state, if it can say; its counters are kept for when it is gone."""
        try:
            answer = await client.get(f"{self.url}/state")
            state: dict[str, Any] = answer.json()
        except (httpx.HTTPError, ValueError):
            return None
        self._core_pid = state["core_pid"]
        self.counters[state["boot_id"]] = state["counters"]
        return state

    async def strike(self, blow: Blow, pause_seconds: float) -> bool:
        """Kill or freeze it; whether there was something to strike."""
        process = self._process
        if process is None or process.returncode is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            if blow == "core":
                # 0 would be this process's own group.
                if not self._core_pid or os.getsid(self._core_pid) != process.pid:
                    return False
                os.kill(self._core_pid, signal.SIGKILL)
            elif blow == "server":
                os.kill(process.pid, signal.SIGKILL)
            elif blow == "worker":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                os.killpg(process.pid, signal.SIGSTOP)
                try:
                    await asyncio.sleep(pause_seconds)
                finally:
                    os.killpg(process.pid, signal.SIGCONT)
            return True
        return False

    async def stop(self) -> None:
        """End it for good."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()


class Fleet:
    """A router and its workers. Use it as a context."""

    def __init__(self, setting: WorkerSetting, num_prefill: int, num_decode: int) -> None:
        self.setting = setting
        roles = {"prefill": num_prefill, "decode": num_decode}
        self.workers = [
            Worker(f"{role}-{number}", role, setting)
            for role, count in roles.items()
            for number in range(count)
        ]
        self._router: asyncio.subprocess.Process | None = None
        self._port = 0
        self.token = secrets.token_hex(16)

    @property
    def url(self) -> str:
        """Where clients ask."""
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> "Fleet":
        folder = self.setting.folder
        (folder / "shm").mkdir(parents=True, exist_ok=True)
        (folder / "token").write_text(self.token)
        for worker in self.workers:
            worker.start()
        self._port, metrics = free_ports(2)
        command = [sys.executable, "-m", "tandem_router.main", "--model", self.setting.model]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--model-name", MODEL_NAME]
        command += ["--metrics-port", str(metrics), "--no-access-log"]
        for worker in self.workers:
            command += ["--worker", f"127.0.0.1:{worker.ports[1]}"]
        with (folder / "router.log").open("ab") as log:
            self._router = await asyncio.create_subprocess_exec(
                *command, stdout=log, stderr=log, start_new_session=True
            )
        try:
            await self._wait_ready()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _wait_ready(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + START_SECONDS
        async with httpx.AsyncClient(timeout=5.0) as client:
            waiting = {worker.url: worker.log for worker in self.workers}
            waiting[self.url] = router_log = self.setting.folder / "router.log"
            while waiting:
                for url in list(waiting):
                    with contextlib.suppress(httpx.HTTPError):
                        if (await client.get(f"{url}/ready")).status_code == 200:
                            del waiting[url]
                if self._router is not None and self._router.returncode is not None:
                    raise EngineError(f"the router can't start: {last_line(router_log)}")
                if loop.time() > end:
                    logs = "; ".join(f"{log.stem}: {last_line(log)}" for log in waiting.values())
                    raise EngineError(
                        f"{len(waiting)} of the fleet's processes are not ready after "
                        f"{START_SECONDS:g} s; the last lines of their logs: {logs}"
                    )
                await asyncio.sleep(0.1)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(worker.stop() for worker in self.workers))
        if self._router is not None and self._router.returncode is None:
            self._router.kill()
            await self._router.wait()

    def totals(self) -> Mapping[str, float]:
        """The workers' counters, of all their lives as far as they were seen."""
        total: Counter[str] = Counter()
        for worker in self.workers:
            for counters in worker.counters.values():
                total.update(counters)
        return total

    def bugs(self) -> list[str]:
        """Lines of the workers' logs that tell of a broken invariant."""
        return [
            f"{worker.name}: {line[:300]}"
            for worker in self.workers
            for line in worker.log.read_text(errors="replace").splitlines()
            if any(bug in line for bug in BUGS) or (ENDS in line and KILLED not in line)
        ]
