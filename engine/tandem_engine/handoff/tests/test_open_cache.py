"""A peer that writes D's cache itself: frozen, killed, late or early, it spoils no page of another.

On a GPU too: `tandem_engine/tests/test_device_open_cache.py`.
"""

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deadlines import patience

from tandem_engine.errors import GateShutError
from tandem_engine.frames import LeaseQuery, LeaseReport
from tandem_engine.handoff.events import FetchDone
from tandem_engine.handoff.pages import KVPages
from tandem_engine.handoff.tests.children import Pipe, Start
from tandem_engine.handoff.tests.host_cache import HostOpenCache, HostPeerCache
from tandem_engine.handoff.tests.scripted import Worker, eventually, make
from tandem_engine.handoff.tests.sleeping import leave_fences_unanswered, wake_after_cut_off
from tandem_engine.handoff.transports import cuda_ipc
from tandem_wire.messages import PrefillPeer


@pytest.fixture(name="options")
def options_fixture(tmp_path: Path) -> dict[str, Any]:
    return {"transport": "cudaIpc", "shm_dir": str(tmp_path)}


class Pause:
    """Holds the pushes of one worker: before they enter the gate, or inside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, worker: Worker, *, inside: bool) -> None:
        self.held, self.release = threading.Event(), threading.Event()
        self.refused = threading.Event()
        kind, way = (HostPeerCache, "write") if inside else (KVPages, "push")
        go_on = getattr(kind, way)

        def wait(target: HostPeerCache | KVPages, *args: Any) -> int:
            if target._kv is worker.kv:
                self.held.set()
                assert self.release.wait(patience(60))
            try:
                found: int = go_on(target, *args)
            except GateShutError:
                self.refused.set()
                raise
            return found

        monkeypatch.setattr(kind, way, wait)


def test_a_writer_that_wakes_after_it_was_cut_off_is_not_let_in(
    stack: ExitStack, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P is frozen before its launch; D gives the pages to another request; P wakes and launches."""
    pause = wake_after_cut_off(
        stack, monkeypatch, options, lambda bad: Pause(monkeypatch, bad, inside=False)
    )
    assert pause.refused.is_set()


def held_states(d: Worker) -> list[str]:
    d.handoff.post(LeaseQuery(1))
    return [fetch.state for fetch in d.wait(LeaseReport).fetches]


def test_the_pages_of_a_writer_that_is_inside_stay_in_quarantine(
    stack: ExitStack, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P is frozen in the middle of a copy: nobody gets the pages before the copy is over."""
    bad, good = make(stack, "bad", **options), make(stack, "good", **options)
    d = make(stack, "d", stall_seconds=patience(0.5), **options)
    assert d.takes(bad)
    pause = Pause(monkeypatch, bad, inside=True)
    leave_fences_unanswered(monkeypatch)
    d.fetch("r", [bad, good])
    bad.push(bad.arrived(), finish=False)
    assert pause.held.wait(patience(20))
    eventually(lambda: held_states(d) == ["quarantined"])
    assert not good.handoff.poll(), "the pages are not another peer's to write"
    pause.release.set()
    arrived = good.arrived()
    source = good.push(arrived)
    assert isinstance(d.outcome("r"), FetchDone)
    assert np.array_equal(d.kv.data[:, :, arrived.request.blocks], good.kv.data[:, :, source])
    assert held_states(d) == []


def be_killed_inside(pipe: Pipe, options: dict[str, Any]) -> None:
    """Push once, then stop inside of the gate until the end."""

    def stay(self: HostPeerCache, blocks: Sequence[int], *_: object) -> None:
        pipe.send("inside")
        threading.Event().wait()

    worker = Worker("child", **options)
    pipe.send(worker.peer)
    worker.push(worker.arrived())
    arrived = worker.arrived()
    HostPeerCache.write = stay  # type: ignore[method-assign,assignment]
    pipe.send(os.getpid())
    worker.push(arrived)
    threading.Event().wait()


def test_a_writer_that_is_killed_inside_is_waited_for_until_it_has_ended(
    stack: ExitStack, options: dict[str, Any], start: Start
) -> None:
    """It never leaves its gate. The request goes on with the next peer, the gate is lost."""
    pipe = start(be_killed_inside, options)
    good, d = make(stack, "good", **options), make(stack, "d", **options)
    peer: PrefillPeer = pipe.recv()
    bad: Any = type("P", (), {"peer": peer})()
    d.fetch("first", [bad])
    assert isinstance(d.outcome("first"), FetchDone)
    d.fetch("r", [bad, good])
    pid: int = pipe.recv()
    assert pipe.recv() == "inside"
    os.kill(pid, signal.SIGKILL)
    arrived = good.arrived()
    source = good.push(arrived)
    assert isinstance(d.outcome("r"), FetchDone)
    assert np.array_equal(d.kv.data[:, :, arrived.request.blocks], good.kv.data[:, :, source])
    cache = d.handoff._transports._usable["cudaIpc"].cache  # type: ignore[attr-defined]
    assert isinstance(cache, HostOpenCache)
    assert 0 not in cache.free_gates, "a gate that still counts someone is never used again"


def test_pages_that_a_step_still_writes_are_not_given_to_the_peer(
    stack: ExitStack, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    assert d.takes(p)
    asked, over = threading.Event(), threading.Event()

    def is_settled(_: object) -> bool:
        asked.set()
        return over.is_set()

    monkeypatch.setattr(d.kv, "is_settled", is_settled)
    pause = Pause(monkeypatch, p, inside=False)
    pause.release.set()
    d.fetch("r", [p])
    arrived = p.arrived()
    source = p.push(arrived)
    assert asked.wait(patience(20))
    assert not pause.held.wait(0.2)
    over.set()
    assert isinstance(d.outcome("r"), FetchDone)
    assert np.array_equal(d.kv.data[:, :, arrived.request.blocks], p.kv.data[:, :, source])


def test_a_gate_is_used_again_by_the_next_generation(
    stack: ExitStack, options: dict[str, Any]
) -> None:
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    assert d.takes(p)
    cache = d.handoff._transports._usable["cudaIpc"].cache  # type: ignore[attr-defined]
    theirs = p.kv.map_cache(cache.descriptors(), cache.details)
    while len(cache.free_gates) > 1:
        cache.free_gates.pop()
    gates = []
    for _ in range(3):
        (session,) = p.handoff._prefill._sessions.values()
        gates.append(session.outbound._gate)  # type: ignore[attr-defined]
        p.handoff._call(session._link.connection.abort)
        eventually(lambda number=gates[-1].number: number in cache.free_gates)  # type: ignore[misc]
        with pytest.raises(GateShutError):
            theirs.put(b"0123456789abcdef", gates[-1], None)
        assert d.takes(p)
        eventually(lambda: len(p.handoff._prefill._sessions) == 1)
    assert gates[0].number == gates[2].number
    assert gates[2].generation == gates[0].generation + 1
    theirs.close()


def test_without_news_of_a_peers_end_pages_go_through_the_ring(
    stack: ExitStack, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_ipc, "_PEER_PROCESS", 12345)
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    d.fetch("r", [p])
    p.push(p.arrived())
    done = d.outcome("r")
    assert isinstance(done, FetchDone)
    assert done.transport == "cudaIpcRing"
    eventually(lambda: bool(d.handoff.pairings()))
    (pairing,) = d.handoff.pairings()
    assert list(pairing.passed_over) == ["cudaIpc"]
    assert "SO_PEERPIDFD" in pairing.passed_over["cudaIpc"]
