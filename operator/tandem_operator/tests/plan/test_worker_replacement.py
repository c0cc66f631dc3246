"""Crashed workers: evidence, back-off, the node that is named."""

from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

from tandem_operator.api.conditions import Condition
from tandem_operator.pair import Role
from tandem_operator.plan.rollout.workers import backoff_seconds
from tandem_operator.tests.facts import Fleet, make_spec


def condition(fleet: Fleet, kind: str) -> Condition:
    return next(item for item in fleet.status.conditions if item.type == kind)


def test_evidence_is_kept_and_the_worker_replaced() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    name = next(n for n, p in fleet.pods.items() if p.role is Role.DECODE)
    fleet.crash(name, "OOMKilled")
    plan = fleet.step()
    assert [item.name for item in plan.delete] == [name]
    assert len(plan.create) == 1
    failure = fleet.status.failures[0]
    assert (failure.pod, failure.exit_code, failure.reason) == (name, 1, "OOMKilled")
    assert failure.log == "last words"
    assert any(note.reason == "WorkerFailed" and note.warning for note in plan.events)
    fleet.settle()
    assert fleet.count(Role.DECODE) == 2
    assert len(fleet.status.failures) == 1


def test_crash_loops_back_off() -> None:
    fleet = Fleet(make_spec(prefill={"replicas": 0}, decode={"replicas": 1}))
    made = []
    for second in range(600):
        plan = fleet.step(start_pods=False)
        made.extend([second] * len(plan.create))
        for name, pod in list(fleet.pods.items()):
            if pod.failure is None:
                fleet.crash(name)
    waits = [after - before for before, after in pairwise(made)]
    assert waits == sorted(waits)
    assert len(made) <= 11
    assert waits[-1] >= 100
    assert len(fleet.status.failures) == 5


def test_backoff_is_bounded() -> None:
    assert backoff_seconds(0) == 0
    assert backoff_seconds(1) == 2
    assert backoff_seconds(50) == 300


def test_a_long_healthy_run_starts_the_count_anew() -> None:
    fleet = Fleet(make_spec(prefill={"replicas": 0}, decode={"replicas": 1}))
    fleet.settle()
    for _ in range(4):
        fleet.now += timedelta(minutes=11)
        fleet.crash(next(iter(fleet.pods)))
        plan = fleet.step()
        assert len(plan.create) == 1
        restarts = plan.create[0]["metadata"]["annotations"]["tandem.dev/restarts"]
        assert restarts == "1"


def fail_on(fleet: Fleet, node: str, elsewhere: str) -> None:
    """Three decode workers in a row end on `node`; the others are on `elsewhere`."""
    for _ in range(3):
        for name, pod in fleet.pods.items():
            fleet.pods[name] = replace(pod, node=elsewhere)
        name = next(n for n, p in fleet.pods.items() if p.failure is None and p.role is Role.DECODE)
        fleet.pods[name] = replace(fleet.pods[name], node=node)
        fleet.crash(name)
        fleet.step(seconds=60)
        fleet.step()


def test_a_node_that_keeps_failing_workers_is_named() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    fail_on(fleet, "bad-node", "good-node")
    degraded = condition(fleet, "Degraded")
    assert degraded.reason == "NodeFailing"
    assert "bad-node" in degraded.message


def test_a_node_is_not_blamed_while_no_other_does_better() -> None:
    """One node, or a spec that fails anywhere: to cordon the node would help nobody."""
    alone = Fleet(make_spec())
    alone.settle()
    fail_on(alone, "only-node", "only-node")
    assert condition(alone, "Degraded").reason == "WorkersFailing"
    other_pool = Fleet(make_spec(decode={"replicas": 1}))
    other_pool.settle()
    fail_on(other_pool, "bad-node", "good-node")
    assert condition(other_pool, "Degraded").reason == "WorkersFailing"


def test_a_surplus_failed_pod_just_goes() -> None:
    fleet = Fleet(make_spec(decode={"replicas": 2}))
    fleet.settle()
    name = next(n for n, p in fleet.pods.items() if p.role is Role.DECODE)
    fleet.crash(name)
    fleet.scale(Role.DECODE, 1)
    plan = fleet.step()
    assert [item.name for item in plan.delete] == [name]
    assert not plan.create


def test_a_pod_deleted_by_hand_comes_back() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    del fleet.pods[next(iter(fleet.pods))]
    fleet.settle()
    assert len(fleet.pods) == 3
