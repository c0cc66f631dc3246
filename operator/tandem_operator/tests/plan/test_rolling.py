"""Ten thousand roll-outs: each instant keeps the bounds, and each of them ends."""

from dataclasses import replace
from datetime import timedelta
from random import Random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tandem_operator.pair import Pair, Role
from tandem_operator.plan import reconcile
from tandem_operator.plan.rollout.counts import Counts, Goal, Workers
from tandem_operator.plan.rollout.rolling import plan_rolling
from tandem_operator.tests.facts import Fleet, make_spec
from tandem_operator.tests.plan.rolling_world import World

NUM_CHAINS = 2000
CHAIN = 5
"""Roll-outs of one world, one after the other: together ten thousand."""

Event = tuple[str, int, int]
sizes = st.builds(Pair, st.integers(1, 8), st.integers(1, 8))
bounds = st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(any)
seeds = st.integers(0, 2**32)
KINDS = ("die", "target", "scale", "undo", "break", "pause")
events = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 8), st.integers(1, 9)), max_size=4
)
chains = st.lists(events, min_size=CHAIN, max_size=CHAIN)


def make_world(size: Pair[int], bound: tuple[int, int], seed: int) -> World:
    """A world in which the first revision has come up."""
    surge, loss = bound
    world = World(Random(seed), size, Pair(surge, surge), Pair(loss, loss))
    world.finish()
    return world


def roll_out(world: World, target: str, history: list[Event]) -> None:
    """Start a roll-out, let the history happen to it, and bring it to its end."""
    world.target = target
    for kind, number, passes in history:
        if kind == "die":
            world.die(number)
        elif kind == "target":
            world.target = f"{target}-{number}"
        elif kind == "undo":
            world.target = world.serving
        elif kind == "scale":
            world.desired = Pair(number, passes)
        elif kind == "break":
            world.bad ^= {world.target}
        elif kind == "pause":
            world.paused = not world.paused
        world.pass_by(passes)
    world.paused = False
    if world.target in world.bad:
        world.target = f"{target}-good"
    world.finish()


@given(sizes, bounds, seeds, chains)
@settings(max_examples=NUM_CHAINS, deadline=None, suppress_health_check=list(HealthCheck))
@example(Pair(1, 3), (1, 0), 0, [[], [], [], [], [("die", 0, 5), ("target", 0, 1)]])
@example(
    Pair(2, 7), (0, 1), 0,
    [[], [], [], [], [("break", 0, 1), ("break", 0, 8), ("undo", 0, 1), ("break", 0, 1)]],
)  # fmt: skip
@example(Pair(2, 8), (0, 1), 511, [[("undo", 3, 5)], [("target", 2, 9), ("die", 1, 2)], [], [], []])
def test_every_roll_out_keeps_its_bounds_and_ends(
    size: Pair[int], bound: tuple[int, int], seed: int, chain: list[list[Event]]
) -> None:
    world = make_world(size, bound, seed)
    for number, history in enumerate(chain):
        roll_out(world, f"r{number}", history)


@given(sizes, st.integers(0, 3), st.integers(1, 3), seeds)
@settings(max_examples=200, deadline=None)
def test_it_ends_without_a_free_gpu(size: Pair[int], surge: int, loss: int, seed: int) -> None:
    world = make_world(size, (surge, loss), seed)
    world.gpus = sum(size)
    roll_out(world, "r", [])


@given(sizes, st.integers(1, 3), seeds)
@settings(max_examples=200, deadline=None)
def test_a_revision_that_fails_takes_nothing_down_while_surge_finds_places(
    size: Pair[int], surge: int, seed: int
) -> None:
    world = make_world(size, (surge, surge), seed)
    world.bad = {"r"}
    world.target = "r"
    for _ in range(40):
        world.pass_by(1)
        ready = world.count().get("a").map(lambda each: each.ready)
        assert ready == size


def step(seen: dict[str, Pair[Workers]], goal: Goal) -> dict[str, Pair[int]]:
    return plan_rolling(Counts(seen), goal).live


def ready(prefill: int, decode: int) -> Pair[Workers]:
    return Pair(Workers(ready=prefill), Workers(ready=decode))


def goal(desired: Pair[int], surge: int, loss: int, fallback: str = "old") -> Goal:
    return Goal("new", desired, Pair(surge, surge), Pair(loss, loss), fallback)


def test_eight_of_eight_gpus_in_use() -> None:
    """Issue: eight new pods stayed Pending for ever."""
    wanted = step({"old": ready(4, 4)}, goal(Pair(4, 4), 0, 1))
    assert wanted["old"] == Pair(3, 3)
    left = {"old": ready(3, 3)}
    assert step(left, goal(Pair(4, 4), 0, 1))["new"] == Pair(1, 1)


def test_a_roll_back_frees_what_is_neither_wanted_nor_serves() -> None:
    """Issue: rolling back after an old decode worker died was a deadlock."""
    seen = {"new": ready(4, 3), "bad": Pair(Workers(pending=1), Workers(pending=1))}
    wanted = step(seen, goal(Pair(4, 4), 0, 1, fallback=""))
    assert (wanted["bad"], wanted["new"]) == (Pair(0, 0), Pair(4, 3))
    wanted = step({"new": ready(4, 3)}, goal(Pair(4, 4), 0, 1, fallback=""))
    assert wanted["new"] == Pair(4, 4)


def test_the_pools_move_in_ratio() -> None:
    """Decode starts faster, but its workers have only one prefill worker to take KV from."""
    seen = {"old": ready(8, 8), "new": Pair(Workers(ready=1, pending=1), Workers(ready=2))}
    wanted = step(seen, goal(Pair(8, 8), 2, 0))
    assert wanted["old"] == Pair(7, 7)


def test_the_last_pair_goes_together() -> None:
    seen = {"old": ready(1, 1), "new": ready(4, 3)}
    assert step(seen, goal(Pair(4, 4), 1, 0))["old"] == Pair(1, 1)
    seen["new"] = ready(4, 4)
    assert step(seen, goal(Pair(4, 4), 1, 0))["old"] == Pair(0, 0)


def test_without_a_node_for_the_surge_an_old_worker_goes_first() -> None:
    waits = Workers(pending=1, unplaced=1)
    seen = {"old": ready(4, 4), "new": Pair(waits, waits)}
    assert step(seen, goal(Pair(4, 4), 1, 1))["old"] == Pair(3, 3)
    assert step(seen, goal(Pair(4, 4), 1, 0))["old"] == Pair(4, 4)


def test_pools_of_one_are_replaced_in_place() -> None:
    assert step({"old": ready(1, 1)}, goal(Pair(1, 1), 0, 1))["old"] == Pair(0, 0)


def test_a_quota_lets_old_workers_go_first() -> None:
    fields = {"rollout": {"maxSurge": 1, "maxUnavailable": 1}}
    fleet = Fleet(make_spec(decode={"replicas": 4}, **fields))
    fleet.settle()
    spec = make_spec(decode={"replicas": 4}, engine={"image": "engine:2"}, **fields)
    seen = replace(fleet.observe(), spec=spec, last_error="pods is forbidden: exceeded quota: gpus")
    plan = reconcile(seen, fleet.now)
    assert not plan.create
    assert {mark.name.split("-")[1] for mark in plan.mark} == {"prefill", "decode"}


def test_a_long_roll_out_is_not_late_while_it_makes_progress() -> None:
    fields = {"decode": {"replicas": 4}, "rollout": {"maxSurge": 1, "progressDeadlineSeconds": 60}}
    fleet = Fleet(make_spec(**fields))
    fleet.settle()
    first = fleet.status.revision
    fleet.edit(make_spec(engine={"image": "engine:2"}, **fields))
    fleet.step()
    for name, pod in fleet.pods.items():
        if pod.revision != first:
            fleet.pods[name] = replace(pod, ready_since=fleet.now + timedelta(seconds=50))
    fleet.now += timedelta(seconds=100)
    fleet.step(start_pods=False)
    reason = next(c.reason for c in fleet.status.conditions if c.type == "Progressing")
    assert reason == "RollingOut"


def num_new(fleet: Fleet, first: str) -> Pair[int]:
    return Pair.build(
        lambda role: sum(p.revision != first and p.role is role for p in fleet.pods.values())
    )


@pytest.mark.parametrize(("surge", "number"), [(1, Pair(1, 1)), ("50%", Pair(2, 3))])
def test_a_surge_is_what_the_field_says(surge: int | str, number: Pair[int]) -> None:
    fields = {
        "prefill": {"replicas": 4},
        "decode": {"replicas": 6},
        "rollout": {"maxSurge": surge},
    }
    fleet = Fleet(make_spec(**fields))
    fleet.settle()
    first = str(fleet.status.revision)
    fleet.edit(make_spec(engine={"image": "engine:2"}, **fields))
    fleet.step(start_pods=False)
    assert num_new(fleet, first) == number
    for role in Role:
        assert sum(p.revision == first and p.live for p in fleet.pods.values() if p.role is role)
    fleet.settle()
    assert num_new(fleet, first) == Pair(4, 6)


@pytest.mark.parametrize(("loss", "left"), [(1, Pair(3, 5)), ("50%", Pair(2, 3))])
def test_what_may_be_missing_is_what_the_field_says(loss: int | str, left: Pair[int]) -> None:
    fields = {
        "prefill": {"replicas": 4},
        "decode": {"replicas": 6},
        "rollout": {"maxSurge": 0, "maxUnavailable": loss},
    }
    fleet = Fleet(make_spec(**fields))
    fleet.settle()
    first = str(fleet.status.revision)
    fleet.edit(make_spec(engine={"image": "engine:2"}, **fields))
    fleet.step()
    assert Pair.build(fleet.count) == left
    assert num_new(fleet, first) == Pair(0, 0)
    fleet.settle()
    assert num_new(fleet, first) == Pair(4, 6)
