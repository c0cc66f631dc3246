"""Drain: mark, finish or move, leases to zero, delete."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

from tandem_operator.facts.worker import WorkerPod, WorkerState
from tandem_operator.names.annotations import ANNOTATION_DRAINING, ANNOTATION_MOVING
from tandem_operator.pair import Role
from tandem_operator.plan.rollout.drain import (
    can_move,
    cancel_drain,
    choose_victim,
    continue_drain,
    start_drain,
)
from tandem_operator.tests.facts import NOW, Fleet, make_pod, make_spec

IDLE = WorkerState(0, 0, draining=True)
BUSY = WorkerState(3, 0, draining=True)
LEASED = WorkerState(0, 2, draining=True)


def draining(seconds: float, state: WorkerState | None, **changes: Any) -> WorkerPod:
    since = NOW - timedelta(seconds=seconds)
    return make_pod(draining_since=since, state=state, **changes)


def test_starts_with_mark_and_call() -> None:
    step = start_drain(make_pod(), NOW, move=True)
    assert step.mark is not None
    assert step.mark.annotations == {
        ANNOTATION_DRAINING: NOW.isoformat(),
        ANNOTATION_MOVING: "true",
    }
    assert step.call is not None
    assert step.call.body == {"move_streams": True}
    assert step.delete is None


def test_a_pod_that_never_started_is_deleted_at_once() -> None:
    assert start_drain(make_pod(started=False), NOW, move=False).delete is not None


def test_waits_for_streams_and_leases() -> None:
    for load in (BUSY, LEASED):
        assert continue_drain(draining(5, load, moving=True), NOW, 60, move=True).delete is None


def test_deletes_an_idle_worker_once_routers_have_seen_the_mark() -> None:
    assert continue_drain(draining(1, IDLE), NOW, 60, move=False).delete is None
    step = continue_drain(draining(3, IDLE), NOW, 60, move=False)
    assert step.delete is not None
    assert step.delete.grace_seconds is None


def test_moves_streams_late_when_nobody_could_take_them_before() -> None:
    assert continue_drain(draining(10, BUSY), NOW, 60, move=False).call is None
    late = continue_drain(draining(31, BUSY), NOW, 60, move=False)
    assert late.call is not None
    assert late.call.body == {"move_streams": True}
    at_once = continue_drain(draining(3, BUSY), NOW, 60, move=True)
    assert at_once.mark is not None


def test_the_deadline_ends_it() -> None:
    step = continue_drain(draining(60, BUSY, moving=True), NOW, 60, move=True)
    assert step.delete is not None
    assert step.delete.grace_seconds == 30


def test_a_lost_call_is_repeated() -> None:
    step = continue_drain(draining(3, WorkerState(2, 0, draining=False)), NOW, 60, move=False)
    assert step.call is not None
    assert step.call.action == "drain"


def test_a_silent_worker_is_left_to_sigterm() -> None:
    assert continue_drain(draining(5, None), NOW, 60, move=False).delete is None
    assert continue_drain(draining(31, None), NOW, 60, move=False).delete is not None


def test_can_be_taken_back() -> None:
    step = cancel_drain(draining(3, BUSY))
    assert step.mark is not None
    assert step.mark.annotations[ANNOTATION_DRAINING] is None
    assert step.call is not None
    assert step.call.action == "undrain"


def test_the_cheapest_worker_goes() -> None:
    light = make_pod("light", state=WorkerState(1, 0, draining=False))
    heavy = make_pod("heavy", state=WorkerState(9, 4, draining=False))
    dear = make_pod("dear", state=WorkerState(0, 0, draining=False), cost=10)
    young = make_pod("young", started=False, ready=False)
    assert choose_victim((heavy, light, dear)).name == "light"
    assert choose_victim((heavy, light, young)).name == "young"
    older = replace(light, name="older", created=NOW - timedelta(hours=9))
    assert choose_victim((older, light)).name == "light"


def test_streams_move_only_to_ready_decode_workers_of_the_same_revision() -> None:
    pod = make_pod("a")
    assert can_move(pod, (pod, make_pod("b")))
    assert not can_move(pod, (pod, make_pod("b", revision="r2")))
    assert not can_move(pod, (pod, make_pod("b", ready=False)))
    prefill = make_pod("p", role=Role.PREFILL)
    assert not can_move(prefill, (pod, prefill))


def test_scale_in_drains_one_at_a_time() -> None:
    fleet = Fleet(make_spec(decode={"replicas": 5}))
    fleet.settle()
    fleet.busy = dict.fromkeys(fleet.pods, 4)
    fleet.scale(Role.DECODE, 2)
    for _ in range(8):
        fleet.step()
        assert sum(pod.draining_since is not None for pod in fleet.pods.values()) <= 1
    assert len([p for p in fleet.pods.values() if p.role is Role.DECODE]) == 5
    fleet.busy.clear()
    fleet.settle()
    assert fleet.count(Role.DECODE) == 2


def test_a_drain_is_taken_back_when_the_pool_grows_again() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    names = set(fleet.pods)
    fleet.busy = dict.fromkeys(fleet.pods, 4)
    fleet.scale(Role.DECODE, 1)
    fleet.step()
    assert any(pod.draining_since for pod in fleet.pods.values())
    fleet.scale(Role.DECODE, 2)
    fleet.settle()
    assert set(fleet.pods) == names
    assert fleet.plans[-1].quiet
