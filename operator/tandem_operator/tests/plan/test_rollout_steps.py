"""Roll-outs of a whole fleet; a change of the model: surge, switch, retire."""

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_operator.manifests.revision import revision_of
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.rollout.stage import RolloutView, Stage, plan_rollout
from tandem_operator.tests.facts import IMAGES, Fleet, make_spec

STEADY = RolloutView("new", "new", True, True, True, False)
views = st.builds(
    RolloutView,
    target=st.sampled_from(["a", "b"]),
    routed=st.sampled_from(["", "a", "b", "c"]),
    routed_served=st.booleans(),
    routers_changed=st.booleans(),
    target_ready=st.booleans(),
    old_workers=st.booleans(),
    paused=st.booleans(),
)


@given(views)
def test_routers_change_over_only_to_ready_workers(view: RolloutView) -> None:
    step = plan_rollout(view)
    if step.route != view.routed and view.routed and view.routed_served:
        assert view.target_ready
        assert not view.paused


@given(views)
def test_workers_behind_a_router_are_never_retired(view: RolloutView) -> None:
    step = plan_rollout(view)
    if step.keep is not None:
        assert step.route in step.keep
        if view.routed and view.routed_served and step.route != view.routed:
            assert view.routed in step.keep


@given(views)
def test_the_target_grows_and_until_the_switch_what_serves_is_kept_up(view: RolloutView) -> None:
    step = plan_rollout(view)
    assert set(step.grow) <= {view.target, view.routed}
    assert step.route in step.grow
    assert view.paused or view.target in step.grow


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
    assert (step.stage, step.grow, step.route) == (Stage.PAUSED, ("old",), "old")
    first = RolloutView("new", "", False, False, False, False, paused=True)
    assert plan_rollout(first).grow == ("new",)


def test_a_paused_spec_waits_and_goes_on() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    pods, first = set(fleet.pods), fleet.status.revision
    newer = {"engine": {"image": "engine:2"}}
    fleet.edit(make_spec(**newer, rollout={"paused": True}))
    fleet.settle()
    assert (set(fleet.pods), fleet.status.revision) == (pods, first)
    fleet.edit(make_spec(**newer))
    fleet.settle()
    assert pods.isdisjoint(fleet.pods)
    assert fleet.status.revision != first


def test_a_dead_old_revision_is_replaced_without_waiting() -> None:
    view = RolloutView("new", "old", False, True, False, True)
    step = plan_rollout(view)
    assert (step.stage, step.route, step.keep) == (Stage.RETIRE, "new", frozenset({"new"}))


def test_a_new_image_replaces_the_old_one_within_the_surge() -> None:
    fleet = Fleet(make_spec(decode={"replicas": 4}, rollout={"maxSurge": 1}))
    fleet.settle()
    first = fleet.status.revision
    fleet.edit(make_spec(decode={"replicas": 4}, rollout={"maxSurge": 1}, engine={"image": "e:2"}))
    fleet.step(start_pods=False)
    assert fleet.router is not None
    assert fleet.router.revision == first
    assert fleet.status.updated_revision not in (None, first)
    assert Pair.build(lambda role: serving(fleet, str(first), role)) == Pair(1, 4)
    assert sorted(p.role for p in fleet.pods.values() if p.revision != first) == sorted(Role)
    fleet.settle()
    assert {pod.revision for pod in fleet.pods.values()} == {fleet.status.revision}
    assert fleet.status.revision != first


def test_a_new_model_comes_up_beside_the_old_one() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    first = fleet.status.revision
    fleet.edit(make_spec(model={"uri": "mock://fast", "revision": "two"}))
    fleet.step(start_pods=False)
    assert fleet.router is not None
    assert fleet.router.revision == first
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


def start_bad_rollout(**fields: Any) -> tuple[Fleet, str]:
    """A fleet in whose roll-out no new worker ever starts, and the revision that serves."""
    fleet = Fleet(make_spec(**fields))
    fleet.settle()
    first = str(fleet.status.revision)
    fleet.edit(make_spec(engine={"image": "typo:1"}, **fields))
    fleet.broken.add(revision_of(fleet.spec, IMAGES))
    fleet.step()
    return fleet, first


def serving(fleet: Fleet, revision: str, role: Role) -> int:
    pods = fleet.pods.values()
    return sum(pod.revision == revision and pod.role is role and pod.ready for pod in pods)


@given(
    st.lists(st.tuples(st.sampled_from(["crash", "delete", "pass"]), st.integers(0, 9)), max_size=9)
)
@settings(max_examples=40, deadline=None)
def test_what_serves_is_kept_up_while_nothing_new_can_start(
    history: list[tuple[str, int]],
) -> None:
    fleet, first = start_bad_rollout()
    for kind, number in history:
        old = sorted(n for n, p in fleet.pods.items() if p.revision == first and p.ready)
        if kind == "crash" and old:
            fleet.crash(old[number % len(old)])
        elif kind == "delete" and len(old) == 3:
            decode = [name for name in old if fleet.pods[name].role is Role.DECODE]
            del fleet.pods[decode[number % len(decode)]]
        fleet.step()
    fleet.step(seconds=400)
    for _ in range(3):
        fleet.step()
    assert Pair.build(lambda role: serving(fleet, first, role)) == Pair(1, 2)
    assert fleet.router is not None
    assert fleet.router.revision == first
    ready = next(item for item in fleet.status.conditions if item.type == "Ready")
    assert ready.status == "True"


def test_the_only_worker_that_serves_is_replaced_at_its_revision() -> None:
    fleet, first = start_bad_rollout(prefill={"replicas": 0}, decode={"replicas": 1})
    (name,) = (name for name, pod in fleet.pods.items() if pod.revision == first)
    fleet.crash(name)
    plan = fleet.step()
    (body,) = plan.create
    engine = body["spec"]["containers"][0]
    assert engine["image"] == "engine:1"
    assert body["metadata"]["labels"]["tandem.dev/revision"] == first
    assert "nodeName" not in body["spec"]
    fleet.step()
    assert serving(fleet, first, Role.DECODE) == 1
    assert fleet.router is not None
    assert fleet.router.revision == first


def test_what_serves_follows_the_load_while_nothing_new_can_start() -> None:
    fleet, first = start_bad_rollout()
    fleet.scale(Role.DECODE, 4)
    for _ in range(4):
        fleet.step()
    assert serving(fleet, first, Role.DECODE) == 4


def test_a_first_revision_that_never_served_is_replaced_without_waiting() -> None:
    """Else workers that can't start would hold the places of those that could."""
    fleet = Fleet(make_spec(engine={"image": "typo:1"}))
    fleet.broken.add(revision_of(fleet.spec, IMAGES))
    for _ in range(4):
        fleet.step()
    fleet.edit(make_spec())
    fleet.step(start_pods=False)
    assert {pod.revision for pod in fleet.pods.values()} == {revision_of(fleet.spec, IMAGES)}


def test_an_outage_is_not_called_serving() -> None:
    fields = {"rollout": {"drainSeconds": 60, "progressDeadlineSeconds": 60}}
    fleet, first = start_bad_rollout(**fields)
    for name, pod in list(fleet.pods.items()):
        if pod.revision == first:
            fleet.crash(name)
    fleet.broken.add(first)
    for _ in range(90):
        fleet.step()
    progressing = next(c for c in fleet.status.conditions if c.type == "Progressing")
    assert progressing.reason == "ProgressDeadlineExceeded"
    assert "continue to serve" not in progressing.message
    assert f"no decode worker of revision {first} is ready" in progressing.message
