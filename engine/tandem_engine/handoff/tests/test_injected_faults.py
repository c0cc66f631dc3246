"""Every fault at every step: the right pages or a failure, then a hand-off that works again."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from deadlines import patience

from tandem_engine.faults import Fault, Step
from tandem_engine.handoff.events import (
    FetchCancelled,
    FetchDone,
    FetchFailed,
    PrefillArrived,
    PrefillDropped,
    PushDone,
    PushFailed,
)
from tandem_engine.handoff.tests.scripted import eventually, make
from tandem_engine.handoff.tests.transport_list import TRANSPORTS

FAULTS = [fault for fault in get_args(Fault) if fault != "kill"]  # test_sudden_death and the soak
BY_TRANSPORT: tuple[Step, ...] = ("pages", "slots")
BY_BOTH = ("handshake", "beat", "slots")
BY_D = ("prefill", "fence", "probe")
ONCE_A_SESSION = ("handshake", "probe")
HASTY: dict[str, Any] = {
    "heartbeat_seconds": 0.2,
    "stall_seconds": 0.5,
    "dial_seconds": 1.0,
    "blacklist_seconds": 0.05,
}


class Pair:
    """P and D, of which one has a fault at one step, and what becomes of D's requests."""

    def __init__(self, stack: ExitStack, side: str, faults: str, **options: Any) -> None:
        self.p, self.d = (
            make(stack, name, faults=faults if name == side else "", **HASTY, **options)
            for name in "pd"
        )
        self.bad = self.p if side == "p" else self.d
        self.num_done = 0
        self._number = 0

    def num_strikes(self) -> int:
        counters = self.bad.handoff.counters()
        return int(sum(counters[key] for key in counters if key.startswith("kv_faults_injected")))

    def round(self) -> None:
        """A request that is served, one that P refuses, and one whose client leaves."""
        for fate in ("serve", "refuse", "cancel"):
            self._number += 1
            rid = f"{fate}-{self._number}"
            before = self.d.kv.data.copy()
            prefill = self.d.fetch(rid, [self.p], 40)
            outcome, source = self._play(rid, fate)
            target = prefill.blocks
            after = self.d.kv.data
            if isinstance(outcome, FetchDone):
                self.num_done += 1
                assert np.array_equal(after[:, :, target], self.p.kv.data[:, :, source]), rid
            others = np.setdiff1d(np.arange(after.shape[2]), target)
            assert np.array_equal(after[:, :, others], before[:, :, others]), rid

    def _play(self, rid: str, fate: str) -> tuple[FetchDone | FetchFailed, list[int]]:
        end = time.monotonic() + patience(30)
        source: list[int] = []
        while time.monotonic() < end:
            for event in self.p.handoff.poll():
                if not isinstance(event, PrefillArrived) or event.request.rid != rid:
                    continue
                if fate == "refuse":
                    self.p.handoff.post(PushFailed(event.key, "no_room", "no pages"))
                else:
                    source = self.p.push(event, finish=fate == "serve")
                if fate == "cancel":
                    self.d.handoff.post(FetchCancelled(rid))
            for outcome in self.d.handoff.poll():
                if isinstance(outcome, FetchDone | FetchFailed) and outcome.rid == rid:
                    return outcome, source
            self.d.wake.wait(0.01)
        raise AssertionError(f"{rid} has no outcome")

    def assert_clean(self) -> None:
        def is_clean() -> bool:
            self.p.handoff.poll()
            self.d.handoff.poll()
            return self.p.handoff.num_leases() == self.d.handoff.num_leases() == 0

        eventually(is_clean)


def survive(step: Step, fault: str, side: str, **options: Any) -> None:
    """Go on until the fault has struck and requests have been served in spite of it."""
    value = "=0.1" if fault == "delay" else ""
    share = 0.05 if step in BY_TRANSPORT else 0.4  # there are several writes to a request
    rate = "#1" if step in ONCE_A_SESSION else f"{share};seed=3"
    with ExitStack() as stack:
        pair = Pair(stack, side, f"{step}:{fault}{value}@{rate}", **options)
        end = time.monotonic() + patience(60)
        while not (pair.num_strikes() and pair.num_done):
            pair.round()
            assert time.monotonic() < end, f"{pair.num_strikes()} strikes, {pair.num_done} done"
        pair.assert_clean()


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_a_message_spoils_a_page_or_leaves_a_lease(fault: str) -> None:
    """All steps at the same time, each with workers of its own: most of it is waiting."""
    cases = [
        (step, side)
        for step in get_args(Step)
        if step not in BY_TRANSPORT
        for side in ("pd" if step in BY_BOTH else "d" if step in BY_D else "p")
    ]
    with ThreadPoolExecutor(len(cases)) as threads:
        running = {
            threads.submit(survive, step, fault, side, transport="tcp"): f"{step} of {side}"
            for step, side in cases
        }
    for case, name in running.items():
        error = case.exception()
        assert error is None, f"{name}: {error!r}"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_a_write_spoils_a_page_or_leaves_a_lease(
    tmp_path: Path, fault: str, transport: str
) -> None:
    cases = [("pages", "p")]
    if transport != "tcp":
        cases += [("slots", "p"), ("slots", "d")]
    options = {"transport": transport, "shm_dir": str(tmp_path)}
    with ThreadPoolExecutor(len(cases)) as threads:
        running = {
            threads.submit(survive, step, fault, side, **options): f"{step} of {side}"  # type: ignore[arg-type]
            for step, side in cases
        }
    for case, name in running.items():
        error = case.exception()
        assert error is None, f"{name}: {error!r}"
    assert not list(tmp_path.iterdir())


def test_without_a_plan_nothing_stands_between(stack: ExitStack) -> None:
    """The connections are plain ones, and a lane's thread calls the transport itself."""
    p, d = make(stack, "p"), make(stack, "d")
    assert d.takes(p)
    (session,) = p.handoff._prefill._sessions.values()
    assert type(session._link.connection).__name__ == "Connection"
    assert session._link.around_lane is None


def test_a_worker_with_faults_says_so(stack: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    p, d = make(stack, "p", faults="pages:corrupt@#2;seed=7"), make(stack, "d")
    assert "this worker injects faults: TANDEM_FAULTS is pages:corrupt@#2;seed=7" in caplog.text
    assert not d.takes(p)
    assert d.handoff.counters()["kv_checksum_errors_total"] == 1
    name = 'kv_faults_injected_total{fault="corrupt",step="pages"}'
    assert p.handoff.counters()[name] == 1
    assert d.takes(p)
    assert p.handoff.counters()[name] == 1


def test_a_request_that_comes_twice_is_computed_once(stack: ExitStack) -> None:
    """To refuse the second would end the first for D, while P goes on writing its pages."""
    p, d = make(stack, "p"), make(stack, "d", faults="prefill:duplicate,probe:duplicate")
    assert d.takes(p)
    d.fetch("r", [p], 40)
    arrived = p.arrived()
    source = p.push(arrived)
    assert isinstance(d.outcome("r"), FetchDone)
    assert np.array_equal(d.kv.data[:, :, arrived.request.blocks], p.kv.data[:, :, source])
    p.wait(PushDone)
    assert not [event for event in p.handoff.poll() if isinstance(event, PrefillArrived)]
    assert "kv_attempt_failures_total" not in d.handoff.counters()
    assert "kv_dial_failures_total" not in d.handoff.counters()


def test_a_session_that_ends_while_a_write_hangs_leaves_no_lease(stack: ExitStack) -> None:
    """P has begun to drop the push, and waits for the lane, when D cuts it off."""
    p, d = make(stack, "p", faults="pages:stall@#2"), make(stack, "d", stall_seconds=patience(0.3))
    d.fetch("r", [p])
    arrived = p.arrived()
    p.push(arrived, finish=False)
    assert isinstance(d.outcome("r"), FetchFailed)
    assert p.wait(PrefillDropped).key == arrived.key
    assert p.handoff.num_leases() == 0
    eventually(lambda: d.takes(p))


def test_a_changed_message_is_not_believed(stack: ExitStack) -> None:
    """One bit of a prompt's tokens: P would compute other KV, with a checksum that holds."""
    p, d = make(stack, "p"), make(stack, "d", faults="prefill:corrupt@#1")
    d.fetch("r", [p])
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert not [event for event in p.handoff.poll() if isinstance(event, PrefillArrived)]
    eventually(lambda: d.takes(p))
