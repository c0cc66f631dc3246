"""A prefill worker that sleeps: it answers no fence, and goes on when it wakes."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

import numpy as np
import pytest
from deadlines import patience

from tandem_engine.handoff.events import FetchDone, FetchFailed, PrefillDropped
from tandem_engine.handoff.prefill.session import PrefillSession
from tandem_engine.handoff.tests.scripted import Worker, eventually, make


class Hold(Protocol):
    """Where a worker sleeps."""

    held: threading.Event
    release: threading.Event


H = TypeVar("H", bound=Hold)


def leave_fences_unanswered(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, and from every worker."""

    async def never(*_: object) -> None:
        return

    monkeypatch.setattr(PrefillSession, "_fence", never)


def wake_after_cut_off(
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    hold: Callable[[Worker], H],
) -> H:
    """P sleeps where `hold` stops it, until D has given its pages to another request.

    D's cache must have what the other worker wrote, and nothing of the one that wakes.
    """
    bad, good = make(stack, "bad", **options), make(stack, "good", **options)
    d = make(stack, "d", stall_seconds=patience(0.5), **options)
    assert d.takes(bad)
    sleep = hold(bad)
    with monkeypatch.context() as asleep:
        leave_fences_unanswered(asleep)
        before = d.kv.data.copy()
        d.fetch("r", [bad])
        bad.push(bad.arrived(), finish=False)
        assert sleep.held.wait(patience(20))
        assert isinstance(d.outcome("r"), FetchFailed)
    d.fetch("again", [good], 40)
    arrived = good.arrived()
    source = good.push(arrived)
    assert isinstance(d.outcome("again"), FetchDone)
    before[:, :, arrived.request.blocks] = good.kv.data[:, :, source]
    sleep.release.set()
    bad.wait(PrefillDropped)
    eventually(lambda: not bad.handoff.num_leases())
    assert np.array_equal(d.kv.data, before)
    return sleep
