"""Real `tandem-worker --mock` processes and a router's end of the wire, for tests."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
from deadlines import patience

from tandem_wire.connection import Connection
from tandem_wire.endpoint import dial
from tandem_wire.messages import (
    Cancel,
    Hello,
    KvEvents,
    Pong,
    PrefillPeer,
    Refused,
    SamplingParams,
    Step,
    StepItem,
    Submit,
    Welcome,
    WorkerMessage,
    WorkerState,
)

DEADLINE = 40.0
ADMIN_TOKEN_FILE = Path(__file__).with_name("admin_token.txt")
ADMIN_FLAGS = ("--admin-token-file", str(ADMIN_TOKEN_FILE))
ADMIN_HEADERS = {"authorization": f"Bearer {ADMIN_TOKEN_FILE.read_text().strip()}"}
DECODER: msgspec.msgpack.Decoder[WorkerMessage] = msgspec.msgpack.Decoder(WorkerMessage)


async def until(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """Poll until `condition()` (or its awaited result) is true; returns it."""
    limit = patience(deadline)
    end = time.monotonic() + limit
    while True:
        result = condition()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return result
        assert time.monotonic() < end, f"waited {limit:.0f} s for {what}"
        await asyncio.sleep(0.01)


class WorkerProcess:
    """One worker process."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process
        self.ports: dict[str, int] = {}
        self.stderr = bytearray()
        self._pump: asyncio.Task[None] | None = None
        self.frozen: list[int] = []  # stopped cores, which don't notice their server's end

    @classmethod
    async def start(
        cls, name: str, *flags: str, mock: str = "tiny", ready: bool = True, **env: str
    ) -> "WorkerProcess":
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tandem_engine.main", "--mock", mock, "--host", "127.0.0.1"),
            *("--http-port", "0", "--wire-port", "0", "--bootstrap-port", "0"),
            *("--local-prefill-tokens", "0", "--page-size", "16", "--chunk-tokens", "64"),
            *("--max-batched-tokens", "64", "--lease-seconds", "2", *ADMIN_FLAGS),
            *flags,
            env={**os.environ, "POD_NAME": name, **env},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        worker = cls(name, process)
        worker._pump = asyncio.create_task(worker._read_stderr())
        if ready:
            await worker.wait_ports()
        return worker

    async def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        while data := await self.process.stderr.read(65536):
            self.stderr += data

    async def wait_ports(self, event: str = "listening") -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(patience(DEADLINE)):
            while not self.ports:
                line = await self.process.stdout.readline()
                assert line, f"{self.name} ended: {self.stderr.decode()}"
                told = json.loads(line)
                if told.pop("event") == event:
                    self.ports = told

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['http']}"

    @property
    def peer(self) -> PrefillPeer:
        return PrefillPeer(self.name, "127.0.0.1", self.ports["bootstrap"])

    async def state(self) -> dict[str, Any]:
        async with httpx.AsyncClient() as client:
            body: dict[str, Any] = (await client.get(f"{self.url}/state")).json()
            return body

    async def counter(self, name: str) -> float:
        """A total by name, summed over its labels."""
        counters: dict[str, float] = (await self.state())["counters"]
        return sum(value for key, value in counters.items() if key.partition("{")[0] == name)

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(timeout=DEADLINE) as client:
            return await client.get(f"{self.url}{path}")

    async def get_admin(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(timeout=DEADLINE) as client:
            return await client.get(f"{self.url}{path}", headers=ADMIN_HEADERS)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        async with httpx.AsyncClient(timeout=DEADLINE) as client:
            return await client.post(f"{self.url}{path}", json=body, headers=ADMIN_HEADERS)

    async def assert_clean(self) -> None:
        """No request, no lease, every block free or cached, none leaked."""
        reports = (await self.state())["reports"]

        async def clean() -> bool:
            state = await self.state()
            ledger = state["ledger"]
            return (
                state["reports"] > reports + 1
                and not state["running"]
                and state["leases"] == 0
                and ledger["leaked"] == ledger["leased"] == ledger["owned"] == 0
            )

        await until(clean, f"{self.name} to be clean: {await self.state()}")

    async def kill_all(self, number: int = signal.SIGKILL) -> None:
        """Signal server and core at once, as the death or freeze of a pod does."""
        core_pid = (await self.state())["core_pid"]
        os.kill(core_pid, number)
        self.process.send_signal(number)
        self.frozen = [core_pid] if number == signal.SIGSTOP else []

    def thaw(self) -> None:
        """Undo a SIGSTOP of `kill_all`."""
        self.process.send_signal(signal.SIGCONT)
        for pid in self.frozen:
            os.kill(pid, signal.SIGCONT)
        self.frozen = []

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    async def wait_exit(self) -> int:
        async with asyncio.timeout(patience(DEADLINE)):
            code = await self.process.wait()
        assert self._pump is not None
        await self._pump
        return code

    async def stop(self) -> None:
        for pid in self.frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process.returncode is None:
            self.process.kill()
        await self.wait_exit()


class RouterClient:
    """A router's end: submits and collects tokens by rid."""

    def __init__(self, connection: Connection[WorkerMessage]) -> None:
        self.connection = connection
        self.welcome: Welcome | None = None
        self.state: WorkerState | None = None
        self.tokens: dict[str, list[int]] = {}
        self.first: dict[str, StepItem] = {}
        self.finish: dict[str, str] = {}
        self.refused: dict[str, Refused] = {}
        self.kv: list[KvEvents] = []
        self.pongs: list[int] = []
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, worker: WorkerProcess, name: str = "router") -> "RouterClient":
        connection = await dial("127.0.0.1", worker.ports["wire"], DECODER)
        connection.send(Hello(name))
        client = cls(connection)
        await until(lambda: client.welcome, "the welcome")
        return client

    async def _read(self) -> None:
        async for message in self.connection:
            match message:
                case Welcome():
                    self.welcome = message
                case WorkerState():
                    self.state = message
                case Step(items):
                    for item in items:
                        self.tokens.setdefault(item.rid, []).extend(item.tokens)
                        self.first.setdefault(item.rid, item)
                        if item.finish:
                            self.finish[item.rid] = item.finish
                case Refused():
                    self.refused[message.rid] = message
                case KvEvents():
                    self.kv.append(message)
                case Pong(number):
                    self.pongs.append(number)

    def submit(
        self, rid: str, tokens: list[int], *peers: PrefillPeer, max_tokens: int = 8, salt: str = ""
    ) -> None:
        self.connection.send(
            Submit(
                rid=rid,
                tokens=tokens,
                num_prompt_tokens=len(tokens),
                params=SamplingParams(max_tokens=max_tokens, temperature=0.0),
                prefill=list(peers),
                cache_salt=salt,
            )
        )

    def cancel(self, rid: str) -> None:
        self.connection.send(Cancel(rid))

    async def result(self, rid: str) -> list[int]:
        await until(lambda: rid in self.finish or rid in self.refused, f"the end of {rid}")
        assert rid not in self.refused, self.refused[rid]
        assert self.finish[rid] in ("stop", "length"), self.finish[rid]
        return self.tokens[rid]

    async def close(self) -> None:
        await self.connection.close()
        await asyncio.wait([self._reader])
        if not self._reader.cancelled():
            self._reader.exception()


def prompt(number: int, length: int = 200) -> list[int]:
    """A prompt of its own, so that no prefix cache knows it."""
    return [(number * 7919 + 13 * position) % 500 for position in range(length)]
