"""A drain or a role that isn't the operator's is undone, or the worker is replaced."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tandem_operator.facts.worker import WorkerState
from tandem_operator.names.annotations import ANNOTATION_DRAINING
from tandem_operator.pair import Role
from tandem_operator.plan.rollout.drain import continue_drain, undo_drain
from tandem_operator.tests.facts import NOW, Fleet, make_pod, make_spec

DRAINED = WorkerState(0, 0, draining=True)


def test_it_is_told_to_work_again() -> None:
    for pod in (
        make_pod(state=DRAINED),
        make_pod(state=DRAINED, ready=False, ready_since=NOW - timedelta(seconds=5)),
    ):
        step = undo_drain(pod, NOW, move=False)
        assert step.call is not None
        assert (step.call.action, step.call.token) == ("undrain", "token")
        assert step.mark is None


@pytest.mark.parametrize("changes", [{"admin_token": ""}, {}])
def test_one_that_does_not_follow_is_replaced(changes: dict[str, str]) -> None:
    since = NOW - timedelta(seconds=31)
    pod = make_pod(state=DRAINED, ready=False, ready_since=since, **changes)
    step = undo_drain(pod, NOW, move=False)
    assert step.mark is not None
    assert step.mark.annotations[ANNOTATION_DRAINING] == NOW.isoformat()
    assert (step.call is None) == ("admin_token" in changes)


def test_a_worker_without_a_known_token_is_left_to_sigterm() -> None:
    busy = WorkerState(3, 0, draining=False)
    pod = make_pod(state=busy, admin_token="", draining_since=NOW - timedelta(seconds=1))
    assert continue_drain(pod, NOW, 60, move=True).delete is None
    pod = replace(pod, draining_since=NOW - timedelta(seconds=3))
    step = continue_drain(pod, NOW, 60, move=True)
    assert step.delete is not None
    assert step.delete.grace_seconds is None, "the pod's own, which is as long as its drain"
    assert step.call is None


def test_a_pool_keeps_its_workers_when_one_is_drained_by_hand() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    names = set(fleet.pods)
    (name, *_) = (name for name, pod in fleet.pods.items() if pod.role is Role.DECODE)
    fleet.draining.add(name)
    plan = fleet.step()
    assert [(call.action, call.pod) for call in plan.engine_calls] == [("undrain", name)]
    assert ("DrainUndone", True) in {(note.reason, note.warning) for note in plan.events}
    fleet.settle()
    assert set(fleet.pods) == names
    assert fleet.draining == set()
    assert fleet.plans[-1].quiet


def test_a_role_that_was_changed_by_hand_is_changed_back() -> None:
    fleet = Fleet(make_spec(kvTransfer={"verify": {"mode": "Off"}}))
    fleet.settle()
    (name, *_) = (name for name, pod in fleet.pods.items() if pod.role is Role.DECODE)
    fleet.told_roles[name] = "prefill"
    plan = fleet.step()
    (call,) = plan.engine_calls
    assert (call.action, call.pod, call.body) == ("role", name, {"role": "decode"})
    assert call.token
    assert ("RoleUndone", True) in {(note.reason, note.warning) for note in plan.events}
    fleet.settle()
    assert fleet.told_roles == {name: "decode"}
    assert fleet.plans[-1].quiet


@pytest.mark.parametrize("changes", [{"draining_since": NOW}, {"admin_token": ""}])
def test_a_role_of_one_that_leaves_or_can_not_be_called_is_left_alone(
    changes: dict[str, Any],
) -> None:
    fleet = Fleet(make_spec(kvTransfer={"verify": {"mode": "Off"}}))
    fleet.settle()
    (name, *_) = (name for name, pod in fleet.pods.items() if pod.role is Role.DECODE)
    fleet.told_roles[name] = "both"
    fleet.pods[name] = replace(fleet.pods[name], **changes)
    assert "role" not in {call.action for call in fleet.step().engine_calls}


def test_what_the_operator_drains_stays_drained() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    fleet.draining.update(name for name in fleet.pods if "decode" in name)
    fleet.busy = dict.fromkeys(fleet.pods, 4)
    fleet.scale(Role.DECODE, 1)
    calls = [call for _ in range(5) for call in fleet.step().engine_calls]
    assert sum(pod.draining_since is not None for pod in fleet.pods.values()) == 1
    (victim,) = (name for name, pod in fleet.pods.items() if pod.draining_since is not None)
    assert victim not in {call.pod for call in calls if call.action == "undrain"}
    assert fleet.draining == {victim}
