"""Whatever happens to a fleet, passes converge to what is wanted and keep their promises."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem_operator.api.conditions import ConditionType, holds
from tandem_operator.pair import Pair, Role
from tandem_operator.plan import Plan, reconcile
from tandem_operator.plan.scale.ratio import allows
from tandem_operator.plan.scale.targets import plan_targets
from tandem_operator.tests.facts import NOW, OPERATOR, Fleet, make_spec

steps = st.lists(
    st.tuples(
        st.sampled_from(["scale", "edit", "crash", "delete", "image", "busy", "pass"]),
        st.sampled_from(list(Role)),
        st.integers(0, 6),
    ),
    max_size=25,
)
ratios = st.sampled_from(
    [
        {},
        {"ratio": {"mode": "Fixed", "fixed": {"prefill": 1, "decode": 2}}},
        {
            "ratio": {
                "mode": "Bounded",
                "min": {"prefill": 1, "decode": 4},
                "max": {"prefill": 2, "decode": 1},
            }
        },
    ]
)


def act(fleet: Fleet, kind: str, role: Role, number: int, fields: dict[str, Any]) -> None:
    names = sorted(name for name, pod in fleet.pods.items() if pod.role is role)
    name = names[number % len(names)] if names else ""
    if kind == "scale" and fleet.pools.of(role) is not None:
        fleet.scale(role, number)
    elif kind == "edit":
        pools = {str(role): {"replicas": number}}
        fields.update(pools)
        fleet.edit(make_spec(**fields))
    elif kind == "image":
        fields["engine"] = {"image": f"engine:{number}"}
        fleet.edit(make_spec(**fields))
    elif kind == "crash" and name and fleet.pods[name].failure is None:
        fleet.crash(name)
    elif kind == "delete" and name:
        del fleet.pods[name]
    elif kind == "busy" and name:
        fleet.busy[name] = number


def check_promises(fleet: Fleet, before: dict[str, Any], plan: Plan) -> None:
    """Drain before delete; one drain at a time; one revision behind the routers."""
    for item in plan.delete:
        pod = before[item.name]
        drained = pod.draining_since is not None
        assert not pod.started or pod.failure is not None or drained, f"{pod} was cut off"
        if drained and pod.started and fleet.busy.get(pod.name):
            assert item.grace_seconds is not None, "a busy worker goes only at its deadline"
    for role in Role:
        current = fleet.router.revision if fleet.router else ""
        draining = [
            pod
            for pod in fleet.pods.values()
            if pod.role is role and pod.draining_since and pod.revision == current
        ]
        revisions = {pod.revision for pod in fleet.pods.values()}
        assert len(draining) <= 1 or len(revisions) > 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ratios, steps)
def test_converges(ratio: dict[str, Any], history: list[tuple[str, Role, int]]) -> None:
    fields = {**ratio, "prefill": {"replicas": 1}, "decode": {"replicas": 2}}
    fleet = Fleet(make_spec(**fields))
    for kind, role, number in history:
        act(fleet, kind, role, number, fields)
        before = dict(fleet.pods)
        plan = fleet.step()
        if kind != "image":
            check_promises(fleet, before, plan)
    fleet.busy.clear()
    fleet.settle()
    desired = plan_targets(fleet.spec, fleet.observe()).map(lambda target: target.desired)
    assert allows(fleet.spec.ratio, desired)
    assert Pair.build(fleet.count) == desired
    assert len({pod.revision for pod in fleet.pods.values()}) <= 1
    assert not any(pod.draining_since or pod.failure for pod in fleet.pods.values())
    if all(desired):
        assert holds(fleet.status.conditions, ConditionType.READY)
    assert fleet.status.updated_revision is None


def test_first_visit_sets_every_condition() -> None:
    fleet = Fleet(make_spec())
    fleet.step(start_pods=False)
    kinds = {condition.type for condition in fleet.status.conditions}
    assert kinds == set(ConditionType)
    assert all(item.reason and item.observed_generation == 1 for item in fleet.status.conditions)
    assert fleet.status.operator == OPERATOR


def test_a_fleet_becomes_ready_and_then_quiet() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    assert holds(fleet.status.conditions, ConditionType.READY)
    assert fleet.status.ratio == "1:2"
    assert fleet.status.transport is not None
    assert fleet.status.transport.megabytes_per_second == 1000
    assert fleet.step().quiet


def test_transition_times_move_only_on_flips() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    before = {item.type: item.last_transition_time for item in fleet.status.conditions}
    fleet.edit(make_spec(router={"replicas": 3}))
    fleet.settle()
    after = {item.type: item.last_transition_time for item in fleet.status.conditions}
    assert after == before
    assert fleet.status.observed_generation == 2


@pytest.mark.parametrize("role", Role)
def test_a_spec_edit_and_a_scale_write_both_reach_the_pool(role: Role) -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    fleet.scale(role, 4)
    fleet.settle()
    assert fleet.count(role) == 4
    fleet.edit(make_spec(**{str(role): {"replicas": 3}}))
    fleet.settle()
    assert fleet.count(role) == 3
    assert fleet.pool(role).replicas == 3


def test_nothing_is_done_for_a_service_that_is_being_deleted() -> None:
    # `kubectl delete --cascade=foreground` shows a service until its children are gone.
    fleet = Fleet(make_spec())
    fleet.settle()
    fleet.deleting_since = fleet.now
    fleet.pods.clear()
    plan = fleet.step()
    assert plan.quiet
    assert not plan.apply
    assert plan.status is None


def test_the_finalizer_of_an_earlier_version_is_taken_off() -> None:
    observed = Fleet(make_spec(), has_former_finalizer=True).observe()
    assert reconcile(replace(observed, spec=None, spec_error="bad"), NOW).drop_finalizer
    for deleting in (False, True):
        fleet = Fleet(make_spec(), has_former_finalizer=True)
        fleet.deleting_since = fleet.now if deleting else None
        fleet.step()
        assert not fleet.has_former_finalizer
        assert not fleet.step().drop_finalizer


def test_an_unreadable_spec_is_told() -> None:
    fleet = Fleet(make_spec())
    observed = fleet.observe()
    plan = reconcile(replace(observed, spec=None, spec_error="spec.model: missing"), fleet.now)
    assert plan.status is not None
    ready = next(item for item in plan.status["conditions"] if item["type"] == "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "InvalidSpec")
    assert plan.events[0].warning
