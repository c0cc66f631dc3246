"""The core in a process of its own, with the real hand-off between two of them."""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from deadlines import patience

from tandem_engine.config import WorkerConfig, parse_args
from tandem_engine.core import child
from tandem_engine.core.process import CoreProcess
from tandem_engine.errors import CoreDiedError
from tandem_engine.frames import (
    CoreFailed,
    CoreReady,
    CoreStep,
    FromCore,
    RoutedSubmit,
    Shutdown,
    pack_frame,
    read_frame,
)
from tandem_engine.mock.runner import MockRunner, load_mock_runner
from tandem_engine.startup import Startup
from tandem_engine.tests.fleet import expected_tokens, prompt
from tandem_wire.messages import PrefillPeer, SamplingParams, StepItem, Submit

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
SECONDS = 30.0


def make_config(name: str, profile: str = "tiny", *flags: str) -> WorkerConfig:
    argv = ["--mock", profile, "--host", "127.0.0.1", "--bootstrap-port", "0", *flags]
    return parse_args(argv, {"POD_NAME": name})


def submit(rid: str, tokens: list[int], *peers: PrefillPeer) -> RoutedSubmit:
    return RoutedSubmit(
        1,
        Submit(
            rid=rid, tokens=tokens, num_prompt_tokens=len(tokens), params=GREEDY, prefill=[*peers]
        ),
    )


async def first(core: CoreProcess, kind: type[Any]) -> Any:
    async def search() -> Any:
        async for frame in core:
            if isinstance(frame, kind):
                return frame
        raise AssertionError(f"no {kind.__name__} came")

    return await asyncio.wait_for(search(), patience(SECONDS))


async def collect(core: CoreProcess, rid: str) -> list[StepItem]:
    async def search() -> list[StepItem]:
        items: list[StepItem] = []
        async for frame in core:
            if isinstance(frame, CoreStep):
                items += [i for routed in frame.routed for i in routed.items if i.rid == rid]
                if items and items[-1].finish:
                    return items
        raise AssertionError("the core ended")

    return await asyncio.wait_for(search(), patience(SECONDS))


@pytest.mark.parametrize(("transfer", "profile"), [("Auto", "tiny"), ("Nixl", "tiny?blocks=24")])
async def test_two_processes_hand_a_prompt_over(
    monkeypatch: pytest.MonkeyPatch, transfer: str, profile: str
) -> None:
    """Pools of one size, and of two."""
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    decode = await CoreProcess.spawn(make_config("d", profile, "--transfer", transfer))
    prefill = await CoreProcess.spawn(make_config("p", "tiny", "--transfer", transfer))
    try:
        ready = await first(prefill, CoreReady)
        assert (await first(decode, CoreReady)).compatibility_hash == ready.compatibility_hash
        tokens = prompt(700)
        decode.send(submit("r", tokens, PrefillPeer("p", "127.0.0.1", ready.bootstrap_port)))
        items = await collect(decode, "r")
        assert [token for item in items for token in item.tokens] == expected_tokens(
            tokens, GREEDY, 700
        )
        assert items[0].prefill_worker == "p"
        assert items[0].kv_bytes == 11 * 64 * 2 * 2 * 8  # blocks, tokens, K/V, layers, bytes
    finally:
        assert await decode.close() == 0
        assert await prefill.close() == 0
    decode.send(Shutdown())  # no one is listening, and nothing happens


async def test_death_of_the_core_is_noticed() -> None:
    core = await CoreProcess.spawn(make_config("a"))
    await first(core, CoreReady)
    os.kill(core.pid, signal.SIGKILL)
    with pytest.raises(CoreDiedError, match="signal 9"):
        await first(core, CoreFailed)


async def test_core_that_cannot_start_says_why() -> None:
    core = await CoreProcess.spawn(make_config("a", "nonsense"))
    failed = await first(core, CoreFailed)
    assert "nonsense" in failed.message
    with pytest.raises(CoreDiedError, match="exit code 1"):
        await first(core, CoreReady)


async def test_core_ends_with_its_server() -> None:
    core = await CoreProcess.spawn(make_config("a"))
    await first(core, CoreReady)
    core._writer.close()  # as if this process had died
    assert await asyncio.to_thread(core._process.wait, patience(SECONDS)) == 0


async def test_core_that_does_not_end_is_killed() -> None:
    core = await CoreProcess.spawn(make_config("a"))
    await first(core, CoreReady)
    os.kill(core.pid, signal.SIGSTOP)  # it hangs
    assert await core.close(grace_seconds=0.2) == -signal.SIGKILL


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator["Serve"]:
    """Starts cores in threads; their pumps have ended before `os._exit` is real again."""
    servers: list[Server] = []

    def start(config: WorkerConfig) -> Server:
        servers.append(Server(monkeypatch, config))
        return servers[-1]

    yield start
    for server in servers:
        server.ours.close()
        server.thread.join(patience(SECONDS))
    for thread in threading.enumerate():
        if thread.name == "pump":
            thread.join(patience(SECONDS))
            assert not thread.is_alive()


Serve = Callable[[WorkerConfig], "Server"]


class Server:
    """The other end of a core that runs in a thread of this process, where coverage sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: WorkerConfig) -> None:
        self.exits: list[int] = []
        monkeypatch.setattr(os, "_exit", self.exits.append)
        monkeypatch.setattr(child, "ORPHAN_SECONDS", 0.0)
        self.ours, theirs = socket.socketpair()
        self.code: list[int] = []
        self.decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
        self.pipe = child.Pipe(theirs)
        self.ours.sendall(pack_frame(msgspec.msgpack.encode(config)))
        received = self.pipe.receive_config()
        assert received == config
        self.thread = threading.Thread(target=self._run, args=(received,))
        self.thread.start()

    def _run(self, config: WorkerConfig) -> None:
        self.code.append(child.run_core(config, self.pipe))

    def send(self, message: Any) -> None:
        self.ours.sendall(pack_frame(msgspec.msgpack.encode(message)))

    def wait_for(self, kind: type[Any]) -> Any:
        self.ours.settimeout(patience(SECONDS))
        while (payload := read_frame(self.ours)) is not None:
            frame = self.decoder.decode(payload)
            if isinstance(frame, kind):
                return frame
        raise AssertionError(f"no {kind.__name__} came")


def test_child_serves_and_ends_on_shutdown(serve: Serve) -> None:
    server = serve(make_config("a"))
    server.wait_for(CoreReady)
    server.send(submit("r", prompt(10)))
    server.wait_for(CoreStep)
    server.send(Shutdown())
    server.thread.join(patience(SECONDS))
    assert server.code == [0]


def test_child_ends_when_the_server_is_gone(serve: Serve) -> None:
    server = serve(make_config("a"))
    server.wait_for(CoreReady)
    server.ours.close()
    server.thread.join(patience(SECONDS))
    assert server.code == [0]
    server.pipe.send(CoreFailed("no one hears this"))
    server.pipe.send(CoreFailed("nor this"))


def test_child_reports_what_keeps_it_from_starting(
    serve: Serve,
) -> None:
    config = make_config("a", "tiny", "--transfer", "CudaIpc")
    server = serve(config)
    assert "CudaIpc" in server.wait_for(CoreFailed).message
    server.thread.join(patience(SECONDS))
    assert server.code == [1]
    server.ours.close()


def test_child_reports_a_failing_step(monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    def load(config: WorkerConfig) -> MockRunner:
        runner = load_mock_runner(config)
        monkeypatch.setattr(runner, "execute", lambda batch: 1 // 0)
        return runner

    monkeypatch.setattr(child, "load_mock_runner", load)
    server = serve(make_config("a"))
    server.wait_for(CoreReady)
    server.send(submit("r", prompt(10)))
    assert "ZeroDivisionError" in server.wait_for(CoreFailed).message
    server.thread.join(patience(SECONDS))
    assert server.code == [1]
    server.ours.close()


def test_real_runner_is_imported_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []

    def load_runner(config: WorkerConfig, progress: Startup, fail: object) -> str:
        progress("weights", 1.0)
        return f"runner of {config.model}"

    monkeypatch.setattr("tandem_engine.load.runner.load_runner", load_runner)
    config = WorkerConfig(model="hf://a/b")
    startup = Startup(lambda stage, part: stages.append(stage))
    runner: Any = child.load_worker_runner(config, startup)
    assert runner == "runner of hf://a/b"
    assert stages == ["importing", "weights"]


def test_relay_keeps_early_messages_and_ends_on_early_shutdown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    relay = child.Relay()
    relay.post(submit("r", [65]))
    relay.post(Shutdown())
    assert exits == [0]

    class Core:
        def __init__(self) -> None:
            self.messages: list[Any] = []

        def post(self, message: Any) -> None:
            self.messages.append(message)

    core = Core()
    relay.connect(core)  # type: ignore[arg-type]
    relay.post(Shutdown())
    assert [type(message) for message in core.messages] == [RoutedSubmit, Shutdown]


def test_main_ends_quietly_without_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    monkeypatch.setattr(sys, "argv", ["child", str(theirs.detach())])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    child.main()
