"""Replace-all: surge, switch, retire; never two revisions behind one router."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tandem_operator.pair import Role
from tandem_operator.plan.rollout.stage import RolloutView, Stage, plan_rollout
from tandem_operator.tests.facts import Fleet, make_spec

STEADY = RolloutView("new", "new", True, True, True, False)
views = st.builds(
    RolloutView,
    target=st.sampled_from(["a", "b"]),
    routed=st.sampled_from(["", "a", "b", "c"]),
    routed_live=st.booleans(),
    routers_changed=st.booleans(),
    target_ready=st.booleans(),
    old_workers=st.booleans(),
    paused=st.booleans(),
)


@given(views)
def test_routers_change_over_only_to_ready_workers(view: RolloutView) -> None:
    step = plan_rollout(view)
    if step.route != view.routed and view.routed and view.routed_live:
        assert view.target_ready
        assert not view.paused


@given(views)
def test_workers_behind_a_router_are_never_retired(view: RolloutView) -> None:
    step = plan_rollout(view)
    if step.keep is not None:
        assert step.route in step.keep
        if view.routed and view.routed_live and step.route != view.routed:
            assert view.routed in step.keep


@given(views)
def test_only_the_target_grows(view: RolloutView) -> None:
    assert plan_rollout(view).grow in ("", view.target)


def test_stages_in_order() -> None:
    old = RolloutView("new", "old", True, True, False, True)
    assert plan_rollout(old).stage is Stage.SURGE
    assert plan_rollout(old).route == "old"
    ready = replace(old, target_ready=True)
    assert plan_rollout(ready).stage is Stage.SWITCH
    assert plan_rollout(ready).route == "new"
    switching = replace(ready, routed="new", routers_changed=False)
    assert plan_rollout(switching).keep is None
    changed = replace(switching, routers_changed=True)
    assert plan_rollout(changed).stage is Stage.RETIRE
    assert plan_rollout(changed).keep == frozenset({"new"})
    assert plan_rollout(STEADY).stage is Stage.STEADY


def test_paused_holds_where_it_is() -> None:
    view = RolloutView("new", "old", True, True, True, True, paused=True)
    step = plan_rollout(view)
    assert (step.stage, step.grow, step.route) == (Stage.PAUSED, "", "old")
    first = RolloutView("new", "", False, False, False, False, paused=True)
    assert plan_rollout(first).grow == "new"


def test_a_dead_old_revision_is_replaced_without_waiting() -> None:
    view = RolloutView("new", "old", False, True, False, True)
    step = plan_rollout(view)
    assert (step.stage, step.route, step.keep) == (Stage.RETIRE, "new", frozenset({"new"}))


def test_a_new_image_rolls_out_beside_the_old_one() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    first = fleet.status.revision
    fleet.edit(make_spec(engine={"image": "engine:2"}))
    fleet.step(start_pods=False)
    assert fleet.router is not None
    assert fleet.router.revision == first
    assert fleet.status.updated_revision not in (None, first)
    assert sum(pod.revision == first and pod.live for pod in fleet.pods.values()) == 3
    assert sum(pod.revision != first for pod in fleet.pods.values()) == 3
    fleet.settle()
    assert {pod.revision for pod in fleet.pods.values()} == {fleet.status.revision}
    assert fleet.status.revision != first


def test_a_failing_revision_stops_and_says_so() -> None:
    spec = make_spec(rollout={"drainSeconds": 60, "progressDeadlineSeconds": 60})
    fleet = Fleet(spec)
    fleet.settle()
    first = fleet.status.revision
    fleet.edit(make_spec(engine={"image": "bad:1"}, rollout=spec.rollout.to_manifest()))
    for _ in range(90):
        fleet.step(start_pods=False)
    progressing = next(c for c in fleet.status.conditions if c.type == "Progressing")
    assert progressing.reason == "ProgressDeadlineExceeded"
    assert fleet.status.revision == first
    assert sum(pod.revision == first and pod.ready for pod in fleet.pods.values()) == 3
    assert next(c for c in fleet.status.conditions if c.type == "Ready").status == "True"


def test_a_revert_in_mid_surge_keeps_the_old_workers() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    first = set(fleet.pods)
    fleet.edit(make_spec(engine={"image": "bad:1"}))
    fleet.step(start_pods=False)
    fleet.edit(make_spec())
    fleet.settle()
    assert set(fleet.pods) == first


def test_scaling_works_while_a_rollout_runs() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    fleet.edit(make_spec(engine={"image": "engine:2"}))
    fleet.step(start_pods=False)
    fleet.scale(Role.DECODE, 4)
    fleet.settle()
    assert fleet.count(Role.DECODE) == 4
