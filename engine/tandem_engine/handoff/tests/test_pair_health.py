"""A pair of workers that loses or changes KV: out of use, by name, until a check has passed."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from deadlines import patience

from tandem_engine.frames import PairTrouble
from tandem_engine.handoff.decode.health import PairHealth
from tandem_engine.handoff.events import FetchDone, FetchFailed, PrefillArrived
from tandem_engine.handoff.tests.scripted import (
    DEADLINE,
    FAST,
    BytesStore,
    Worker,
    eventually,
    make,
)
from tandem_engine.handoff.transports.tcp import TcpInbound

SETTINGS = replace(
    FAST, fault_window_seconds=60.0, out_of_use_seconds=30.0, max_out_of_use_seconds=100.0
)
ALWAYS: dict[str, Any] = {"transport": "tcp", "fault_window_seconds": 1e6}
"""However slow the machine is, the faults of a test lie within one window."""


@pytest.fixture(autouse=True)
def through_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that writes can be turned and lost between the link and the cache."""
    monkeypatch.setattr(BytesStore, "views", lambda *_: None)


@pytest.fixture(name="noisy")
def noisy_fixture(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Bootstrap ports of workers from which every write arrives with one bit turned."""
    ports: set[int] = set()
    land = TcpInbound._land

    def turn(
        self: TcpInbound, epoch: int, blocks: Sequence[int], layers: range, payload: memoryview
    ) -> None:
        if self._address[1] in ports:
            payload[len(payload) // 2] ^= 1
        land(self, epoch, blocks, layers, payload)

    monkeypatch.setattr(TcpInbound, "_land", turn)
    return ports


def fetch(d: Worker, peers: list[Worker], rid: str) -> tuple[FetchDone | FetchFailed, list[str]]:
    """The outcome of one fetch, and who was asked for it."""
    d.fetch(rid, peers)
    asked = []
    end = time.monotonic() + patience(DEADLINE)
    while time.monotonic() < end:
        for peer in peers:
            for event in peer.handoff.poll():
                if isinstance(event, PrefillArrived):
                    asked.append(peer.name)
                    peer.push(event)
        for outcome in d.handoff.poll():
            if isinstance(outcome, FetchDone | FetchFailed) and outcome.rid == rid:
                return outcome, asked
        d.wake.wait(0.01)
    raise AssertionError("no outcome")


def trouble_of(d: Worker) -> PairTrouble | None:
    troubles = d.handoff.troubles()
    assert len(troubles) <= 1
    return troubles[0] if troubles else None


def is_out(d: Worker) -> bool:
    trouble = trouble_of(d)
    return trouble is not None and trouble.out_of_use


def test_a_pair_that_changes_bytes_is_taken_out_and_named(
    stack: ExitStack, noisy: set[int]
) -> None:
    bad, good = make(stack, "bad", **ALWAYS), make(stack, "good", **ALWAYS)
    d = make(stack, "d", out_of_use_seconds=1e6, **ALWAYS)
    assert d.takes(bad)
    noisy.add(bad.handoff.bootstrap_port)
    for number in range(3):
        outcome, asked = fetch(d, [bad, good], f"r{number}")
        assert isinstance(outcome, FetchDone)
        assert (outcome.worker_id, asked) == ("good", ["bad", "good"])
    outcome, asked = fetch(d, [bad, good], "after")
    assert isinstance(outcome, FetchDone)
    assert asked == ["good"]
    outcome, _ = fetch(d, [bad], "alone")
    assert isinstance(outcome, FetchFailed)
    assert "out of use" in outcome.message
    assert "another checksum" in outcome.message
    eventually(lambda: is_out(d))
    trouble = trouble_of(d)
    assert trouble is not None
    assert (trouble.worker_id, trouble.transport, trouble.num_faults) == ("bad", "tcp", 3)
    assert trouble.address == f"127.0.0.1:{bad.handoff.bootstrap_port}"
    assert "another checksum" in trouble.reason
    eventually(lambda: d.handoff.gauges().get('kv_pair_out_of_use{peer="bad"}') == 1.0)
    assert d.handoff.counters()["kv_link_faults_total"] == 3
    assert d.handoff.counters()["kv_pairs_taken_out_total"] == 1


def test_it_is_back_when_a_pattern_arrives_whole_and_not_before(
    stack: ExitStack, noisy: set[int]
) -> None:
    p = make(stack, "p", **ALWAYS)
    d = make(stack, "d", out_of_use_seconds=0.05, max_out_of_use_seconds=0.1, **ALWAYS)
    noisy.add(p.handoff.bootstrap_port)
    assert not d.takes(p), "not even the first page comes over a new session"
    assert not is_out(d), "that is a peer that can't be reached, not one that was seen to fail"
    noisy.clear()
    eventually(lambda: d.takes(p))
    noisy.add(p.handoff.bootstrap_port)
    for _ in range(3):
        assert not d.takes(p)
    eventually(lambda: is_out(d))
    # A failed check ends the session, and the next one needs a session that moves a page.
    failed = d.handoff.counters()["kv_dial_failures_total"]
    eventually(lambda: d.handoff.counters()["kv_dial_failures_total"] > failed + 2)
    assert is_out(d)
    noisy.clear()
    eventually(lambda: not is_out(d))
    assert d.takes(p)
    eventually(lambda: d.handoff.gauges().get('kv_pair_out_of_use{peer="p"}') == 0.0)


def test_one_fault_takes_no_one_out(stack: ExitStack, noisy: set[int]) -> None:
    p, d = make(stack, "p", **ALWAYS), make(stack, "d", out_of_use_seconds=1e6, **ALWAYS)
    assert d.takes(p)
    noisy.add(p.handoff.bootstrap_port)
    assert not d.takes(p)
    noisy.clear()
    assert d.takes(p)
    eventually(lambda: trouble_of(d) is not None)
    assert not is_out(d)


def test_bytes_that_are_committed_and_never_come_count(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = make(stack, "p", **ALWAYS), make(stack, "d", stall_seconds=patience(0.3), **ALWAYS)
    assert d.takes(p)
    with monkeypatch.context() as patched:
        patched.setattr(TcpInbound, "_land", lambda *_: None)
        assert not d.takes(p)
    eventually(lambda: trouble_of(d) is not None)
    trouble = trouble_of(d)
    assert trouble is not None
    assert "committed bytes did not come" in trouble.reason
    assert d.takes(p)


def test_faults_that_lie_far_apart_take_no_one_out() -> None:
    health = PairHealth(SETTINGS)
    assert not any(health.note_fault("bit", at) for at in (0.0, 31.0, 62.0, 93.0))
    assert (health.num_faults, health.out_of_use) == (4, False)


def test_the_third_fault_of_a_window_takes_it_out_once() -> None:
    health = PairHealth(SETTINGS)
    assert [health.note_fault("bit", at) for at in (0.0, 1.0, 2.0, 3.0)] == [
        False, False, True, False,
    ]  # fmt: skip
    assert (health.out_of_use, health.check_at) == (True, 32.0)


def test_rests_grow_with_each_failed_check_and_each_relapse() -> None:
    health = PairHealth(SETTINGS)
    for at in (0.0, 0.0, 0.0):
        health.note_fault("bit", at)
    health.fail_check("still", 30.0)
    assert (health.check_at, health.reason) == (90.0, "still")
    health.pass_check(90.0)
    assert not health.out_of_use
    assert health.note_fault("again", 100.0), "one fault is enough soon after a check"
    assert health.check_at == 200.0, "twice as long, and no longer than the most"
    health.pass_check(200.0)
    assert not health.note_fault("much later", 1000.0)
    assert not health.out_of_use
