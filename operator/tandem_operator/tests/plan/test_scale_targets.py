"""One owner of replicas at a time."""

from dataclasses import replace

from tandem_operator.api.status import ScaledBy
from tandem_operator.facts.observed import Observed, PoolView
from tandem_operator.facts.scaling import PolicyDecision
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.scale.targets import PoolTarget, plan_targets
from tandem_operator.tests.facts import Fleet, make_observed, make_spec


def observed(prefill: tuple[int, int], decode: tuple[int, int], last: Pair[int]) -> Observed:
    """Pools as (replicas, spec_replicas)."""
    pools = Pair(
        PoolView("p", "1", *prefill, desired=last.prefill),
        PoolView("d", "2", *decode, desired=last.decode),
    )
    return make_observed(pools=pools)


def desired(targets: Pair[PoolTarget]) -> Pair[int]:
    return targets.map(lambda target: target.desired)


def test_the_spec_rules_until_someone_scales() -> None:
    targets = plan_targets(make_spec(), observed((1, 1), (2, 2), Pair(1, 2)))
    assert desired(targets) == Pair(1, 2)
    assert {target.scaled_by for target in targets} == {ScaledBy.USER}
    edited = make_spec(prefill={"replicas": 4}, decode={"replicas": 5})
    assert desired(plan_targets(edited, observed((1, 1), (2, 2), Pair(1, 2)))) == Pair(4, 5)


def test_a_scale_write_wins_until_the_next_edit() -> None:
    facts = observed((1, 1), (5, 2), Pair(1, 2))
    target = plan_targets(make_spec(), facts).of(Role.DECODE)
    assert (target.desired, target.scaled_by, target.spec_replicas) == (5, ScaledBy.EXTERNAL, 2)
    edited = plan_targets(make_spec(decode={"replicas": 3}), facts).of(Role.DECODE)
    assert (edited.desired, edited.scaled_by, edited.replicas) == (3, ScaledBy.USER, 3)


def test_an_active_policy_rules_and_keeps_writes_for_later() -> None:
    decision = PolicyDecision(Pair(2, 4), "because")
    facts = observed((1, 1), (7, 2), Pair(1, 2))
    targets = plan_targets(make_spec(), facts, decision)
    assert desired(targets) == Pair(2, 4)
    decode = targets.decode
    assert (decode.scaled_by, decode.replicas, decode.ignored_replicas) == (ScaledBy.POLICY, 7, 7)
    assert "policy" in decode.ignored
    advisory = replace(decision, active=False)
    assert desired(plan_targets(make_spec(), facts, advisory)) == Pair(1, 7)


def test_the_ratio_binds_a_policy_too() -> None:
    spec = make_spec(ratio={"mode": "Fixed", "fixed": {"prefill": 1, "decode": 2}})
    facts = observed((1, 1), (2, 2), Pair(1, 2))
    targets = plan_targets(spec, facts, PolicyDecision(Pair(1, 3), ""))
    assert desired(targets) == Pair(2, 4)


def test_a_write_that_breaks_the_ratio_is_held_back_and_told() -> None:
    ratio = {"mode": "Bounded", "min": {"prefill": 1, "decode": 4}}
    fleet = Fleet(make_spec(ratio=ratio))
    fleet.settle()
    fleet.scale(Role.DECODE, 9)
    plan = fleet.step()
    note = next(note for note in plan.events if note.reason == "ScaleHeldBack")
    assert "9" in note.message
    assert "min 1:4" in note.message
    fleet.settle()
    pool = fleet.pool(Role.DECODE)
    assert (pool.replicas, pool.ignored_scale[:2]) == (4, "9:")
    fleet.scale(Role.DECODE, 3)
    fleet.settle()
    assert fleet.pool(Role.DECODE).ignored_scale == ""


def test_fixed_scales_the_other_pool() -> None:
    ratio = {"mode": "Fixed", "fixed": {"prefill": 1, "decode": 2}}
    fleet = Fleet(make_spec(ratio=ratio))
    fleet.settle()
    fleet.scale(Role.PREFILL, 3)
    fleet.settle()
    assert (fleet.count(Role.PREFILL), fleet.count(Role.DECODE)) == (3, 6)
    assert fleet.pool(Role.DECODE).replicas == 6
    assert fleet.status.ratio == "3:6"
