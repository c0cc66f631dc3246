"""One owner of replicas at a time."""

from dataclasses import replace

from tandem_operator.api.names import RoleLabel
from tandem_operator.api.status import ScaledBy
from tandem_operator.observed import Counts, Observed, PolicyDecision, PoolView
from tandem_operator.scaling import plan_targets
from tandem_operator.tests.facts import Fleet, make_observed, make_spec


def observed(
    prefill: tuple[int, int], decode: tuple[int, int], last: Counts, **changes: object
) -> Observed:
    """Pools as (replicas, spec_replicas)."""
    pools = {
        RoleLabel.PREFILL: PoolView("p", "1", *prefill, desired=last.prefill),
        RoleLabel.DECODE: PoolView("d", "2", *decode, desired=last.decode),
    }
    return make_observed(pools=pools, **changes)


def test_the_spec_rules_until_someone_scales() -> None:
    targets = plan_targets(make_spec(), observed((1, 1), (2, 2), Counts(1, 2)))
    assert targets.desired == Counts(1, 2)
    assert {target.scaled_by for target in targets.pools.values()} == {ScaledBy.USER}


def test_a_scale_write_wins_until_the_next_edit() -> None:
    facts = observed((1, 1), (5, 2), Counts(1, 2))
    target = plan_targets(make_spec(), facts).pools[RoleLabel.DECODE]
    assert (target.desired, target.scaled_by, target.spec_replicas) == (5, ScaledBy.EXTERNAL, 2)
    edited = plan_targets(make_spec(decode={"replicas": 3}), facts).pools[RoleLabel.DECODE]
    assert (edited.desired, edited.scaled_by, edited.replicas) == (3, ScaledBy.USER, 3)


def test_an_active_policy_rules_and_keeps_writes_for_later() -> None:
    decision = PolicyDecision(Counts(2, 4), "because")
    facts = observed((1, 1), (7, 2), Counts(1, 2), decision=decision)
    targets = plan_targets(make_spec(), facts)
    assert targets.desired == Counts(2, 4)
    decode = targets.pools[RoleLabel.DECODE]
    assert (decode.scaled_by, decode.replicas, decode.ignored_replicas) == (ScaledBy.POLICY, 7, 7)
    assert "policy" in decode.ignored
    advisory = replace(facts, decision=replace(decision, active=False))
    assert plan_targets(make_spec(), advisory).desired == Counts(1, 7)


def test_the_ratio_binds_a_policy_too() -> None:
    spec = make_spec(ratio={"mode": "Fixed", "fixed": {"prefill": 1, "decode": 2}})
    facts = observed((1, 1), (2, 2), Counts(1, 2), decision=PolicyDecision(Counts(1, 3), ""))
    assert plan_targets(spec, facts).desired == Counts(2, 4)


def test_a_write_that_breaks_the_ratio_is_held_back_and_told() -> None:
    ratio = {"mode": "Bounded", "min": {"prefill": 1, "decode": 4}}
    fleet = Fleet(make_spec(ratio=ratio))
    fleet.settle()
    fleet.scale(RoleLabel.DECODE, 9)
    plan = fleet.step()
    note = next(note for note in plan.events if note.reason == "ScaleHeldBack")
    assert "9" in note.message
    assert "min 1:4" in note.message
    fleet.settle()
    pool = fleet.pools[RoleLabel.DECODE]
    assert (pool.replicas, pool.ignored_scale[:2]) == (4, "9:")
    fleet.scale(RoleLabel.DECODE, 3)
    fleet.settle()
    assert fleet.pools[RoleLabel.DECODE].ignored_scale == ""


def test_fixed_scales_the_other_pool() -> None:
    ratio = {"mode": "Fixed", "fixed": {"prefill": 1, "decode": 2}}
    fleet = Fleet(make_spec(ratio=ratio))
    fleet.settle()
    fleet.scale(RoleLabel.PREFILL, 3)
    fleet.settle()
    assert (fleet.count(RoleLabel.PREFILL), fleet.count(RoleLabel.DECODE)) == (3, 6)
    assert fleet.pools[RoleLabel.DECODE].replicas == 6
    assert fleet.status.ratio == "3:6"
