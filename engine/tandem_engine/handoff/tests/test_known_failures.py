"""Failures that other engines have had, over every transport: docs/handoff-failures.md."""

import threading
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from deadlines import patience

from tandem_engine.handoff.events import (
    FetchCancelled,
    FetchDone,
    FetchFailed,
    FetchRequest,
    PrefillDropped,
    PushChunk,
    PushFailed,
)
from tandem_engine.handoff.pages import KVPages
from tandem_engine.handoff.tests.scripted import PAGE, Worker, eventually, make
from tandem_wire.messages import SamplingParams

Over = dict[str, Any]


def ask(d: Worker, p: Worker, rid: str, first_block: int, num_tokens: int = 2 * PAGE) -> None:
    """A fetch into blocks of its own."""
    num_blocks = -(-num_tokens // PAGE)
    d.handoff.post(
        FetchRequest(
            rid=rid,
            tokens=tuple(range(num_tokens)),
            num_prompt_tokens=num_tokens,
            num_skip_tokens=0,
            blocks=tuple(range(first_block, first_block + num_blocks)),
            params=SamplingParams(max_tokens=4),
            peers=(p.peer,),
        )
    )


def test_every_attempt_has_an_epoch_of_its_own(stack: ExitStack, over: Over) -> None:
    """Late answers to one attempt can't be taken for answers to the next one of the request."""
    p1, p2, d = (make(stack, name, **over) for name in ("p1", "p2", "d"))
    epochs = []
    for _ in range(2):  # the same request id again, as a router that tries again would use it
        d.fetch("r", [p1, p2])
        first = p1.arrived()
        p1.handoff.post(PushFailed(first.key, "no_room", "no pages"))
        second = p2.arrived()
        p2.push(second)
        assert isinstance(d.outcome("r"), FetchDone)
        epochs += [first.request.epoch, second.request.epoch]
    assert epochs == sorted(set(epochs))


def test_requests_at_the_same_time_get_their_own_pages(stack: ExitStack, over: Over) -> None:
    p, d = make(stack, "p", **over), make(stack, "d", **over)
    expected = d.kv.data.copy()
    for number in range(20):
        ask(d, p, f"r{number}", 2 * number)
    arrived = [p.arrived() for _ in range(20)]
    for number, each in enumerate(reversed(arrived)):
        source = (40 + number, 63 - number)
        p.handoff.post(PushChunk(each.key, 0, PAGE, source[:1]))
        p.handoff.post(PushChunk(each.key, PAGE, 2 * PAGE, source[1:], last=True, first_token=1))
        expected[:, :, each.request.blocks] = p.kv.data[:, :, source]
    for number in range(20):
        assert isinstance(d.outcome(f"r{number}"), FetchDone)
    assert np.array_equal(d.kv.data, expected)


def test_a_prompt_that_was_cut_short_is_not_decoded(stack: ExitStack, over: Over) -> None:
    """P commits what it has, with the right bytes and checksum, but not all of the tokens."""
    p, d = make(stack, "p", **over), make(stack, "d", **over)
    ask(d, p, "r", 10)
    arrived = p.arrived()
    short = PushChunk(arrived.key, 0, 2 * PAGE - 1, (30, 31), last=True, first_token=1)
    p.handoff.post(short)
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert f"committed {2 * PAGE - 1} of {2 * PAGE} tokens" in failed.message


def test_fewer_pages_than_asked_for_are_not_decoded(stack: ExitStack, over: Over) -> None:
    p, d = make(stack, "p", **over), make(stack, "d", **over)
    ask(d, p, "r", 10)
    p.handoff.post(PushChunk(p.arrived().key, 0, 2 * PAGE, (30,), last=True, first_token=1))
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert "were asked for" in failed.message


def test_a_lease_that_ran_out_writes_nothing_more(stack: ExitStack, over: Over) -> None:
    """P's blocks are another request's by then; what its core still says of them is not sent."""
    p = make(stack, "p", **over)
    d = make(stack, "d", heartbeat_seconds=5.0, lease_seconds=0.3, **over)
    before = d.kv.data.copy()
    ask(d, p, "r", 10)
    arrived = p.arrived()
    assert p.wait(PrefillDropped).key == arrived.key
    assert isinstance(d.outcome("r"), FetchFailed)
    p.handoff.post(PushChunk(arrived.key, 0, 2 * PAGE, (30, 31), last=True, first_token=1))
    assert d.takes(p)  # what comes later than that has been dealt with
    target = [10, 11, 12]
    before[:, :, target] = d.kv.data[:, :, target]
    assert np.array_equal(d.kv.data, before)
    assert d.handoff.counters()["kv_stale_writes_total"] == 0


def test_blocks_stay_pinned_until_their_last_read(
    stack: ExitStack, over: Over, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client leaves in the middle of P's read: P's core hears of it after the read alone."""
    p, d = make(stack, "p", **over), make(stack, "d", **over)
    assert d.takes(p)
    eventually(lambda: not p.handoff.num_leases())
    held, release = threading.Event(), threading.Event()

    def hold(way: str) -> None:
        read = getattr(KVPages, way)

        def wait(pages: KVPages, *args: Any) -> Any:
            if pages._kv is p.kv:
                held.set()
                assert release.wait(patience(20))
            return read(pages, *args)

        monkeypatch.setattr(KVPages, way, wait)

    hold("export")
    hold("views")
    hold("stage")
    hold("push")
    ask(d, p, "r", 10)
    arrived = p.arrived()
    p.push(arrived, finish=False)
    assert held.wait(patience(20))
    d.handoff.post(FetchCancelled("r"))
    eventually(lambda: p.handoff.counters().get("kv_fences_total", 0) == 1)
    assert not [event for event in p.handoff.poll() if isinstance(event, PrefillDropped)]
    assert p.handoff.num_leases() == 1
    release.set()
    assert p.wait(PrefillDropped).key == arrived.key
    assert isinstance(d.outcome("r"), FetchFailed)


def test_one_error_does_not_shut_a_peer_out(stack: ExitStack, over: Over) -> None:
    """The next request goes to the same peer over the same connection."""
    p, d = make(stack, "p", **over), make(stack, "d", **over)
    for number in range(3):
        ask(d, p, f"r{number}", 10)
        p.handoff.post(PushFailed(p.arrived().key, "internal", "this prompt alone"))
        assert isinstance(d.outcome(f"r{number}"), FetchFailed)
    assert d.takes(p)
    assert d.handoff.counters()["kv_dials_total"] == 1
