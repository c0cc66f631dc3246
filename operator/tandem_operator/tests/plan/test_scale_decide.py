"""The scaling decision: causes, holds, limits, and that it converges.

Aspects: each pool by its own signal; idle; stale; infeasible; gate; budget; ratio; hold; simulated
to completion under hypothesis.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_operator.api.autoscaling_policy import AutoscalingPolicySpec
from tandem_operator.api.ratio import Ratio
from tandem_operator.facts.scaling import ScalerState
from tandem_operator.facts.signals import DecodeSignals, PrefillSignals, Signals
from tandem_operator.pair import Pair
from tandem_operator.plan.scale.decide import Decision, decide
from tandem_operator.plan.scale.need import PoolSize, Situation, Sizes
from tandem_operator.plan.scale.ratio import allows, hold_ratio

POLICY = AutoscalingPolicySpec.model_validate(
    {
        "pools": {"prefill": {"min": 1, "max": 8}, "decode": {"min": 1, "max": 8}},
        "scaleIn": {"minHoldSeconds": 10},
    }
)
BUSY = Signals(age_seconds=1, requests_per_second=5, num_inflight=10)


def run(
    signals: Signals,
    sizes: Sizes,
    state: ScalerState | None = None,
    now: float = 100.0,
    policy: AutoscalingPolicySpec = POLICY,
    **more: Any,
) -> Decision:
    objectives = Pair(2.0, 0.05)
    at = Situation(policy, objectives, sizes, signals, state or ScalerState(), **more)
    return decide(at, now)


def fleet(
    prefill: int,
    decode: int,
    *,
    pending: Pair[int] = Pair(0, 0),
    ages: Pair[float] = Pair(math.inf, math.inf),
    **more: Any,
) -> Sizes:
    ready = Pair(prefill, decode)
    pools = Pair.build(lambda role: PoolSize(ready.of(role), pending.of(role), ages.of(role)))
    return Sizes(pools, **more)


def test_a_backlog_of_prompts_grows_prefill_alone() -> None:
    signals = replace(BUSY, prefill=PrefillSignals(ttft_seconds=5.0, queued_seconds=3.0))
    decision = run(signals, fleet(1, 2))
    assert decision.desired.prefill == 3
    assert decision.desired.decode <= 2
    assert "prompts are waiting" in decision.because.prefill


def test_full_kv_grows_decode_alone() -> None:
    full = DecodeSignals(tbt_seconds=0.04, kv_usage=0.95, max_kv_usage=0.97, num_running=50)
    decision = run(replace(BUSY, decode=full), fleet(1, 2))
    assert (decision.desired.prefill, decision.desired.decode) == (1, 3)
    assert "KV use 95%" in decision.because.decode


def test_slow_tokens_grow_decode_alone() -> None:
    slow = DecodeSignals(tbt_seconds=0.09, kv_usage=0.3, num_running=50)
    decision = run(replace(BUSY, decode=slow), fleet(1, 2))
    assert (decision.desired.prefill, decision.desired.decode) == (1, 4)
    assert "TBT 90 ms > 50 ms" in decision.because.decode


def test_idle_goes_to_the_minimum_one_at_a_time_after_the_hold() -> None:
    idle = Signals(age_seconds=1)
    sizes, state, now = fleet(3, 3), ScalerState(), 0.0
    path = []
    for _ in range(40):
        decision = run(idle, sizes, state, now)
        removed = (sizes.totals.prefill - decision.desired.prefill) + (
            sizes.totals.decode - decision.desired.decode
        )
        assert removed in (0, 1)
        sizes = fleet(*decision.desired)
        state, now = decision.state, now + 5
        path.append((sizes.totals.prefill, sizes.totals.decode))
    assert path[0] == (3, 3)
    assert path[-1] == (1, 1)


def test_stale_metrics_hold() -> None:
    signals = replace(BUSY, age_seconds=31, prefill=PrefillSignals(queued_seconds=100))
    decision = run(signals, fleet(2, 3))
    assert (decision.desired.prefill, decision.desired.decode) == (2, 3)
    assert decision.metrics_stale
    assert "no complete metrics for more than 30 s" in decision.because.prefill


def test_a_prompt_that_alone_breaks_the_objective_does_not_scale() -> None:
    signals = replace(BUSY, prefill=PrefillSignals(ttft_seconds=9.0))
    decision = run(signals, fleet(2, 2))
    assert decision.desired.prefill == 2
    assert "more workers would not help" in decision.slo_infeasible


def test_prefill_is_gated_while_decode_is_the_cause() -> None:
    signals = replace(
        BUSY,
        prefill=PrefillSignals(ttft_seconds=6.0, busy_workers=1.5, queued_seconds=0.1),
        decode=DecodeSignals(kv_usage=0.99, max_kv_usage=1.0, num_running=9, num_waiting=5),
    )
    decision = run(signals, fleet(1, 1))
    assert decision.desired.prefill == 1
    assert decision.desired.decode == 2
    assert decision.gated_by_peer


def test_the_gpu_budget_limits_growth() -> None:
    policy = POLICY.model_copy(
        update={"coordination": POLICY.coordination.model_copy(update={"gpu_budget": 4})}
    )
    signals = replace(BUSY, prefill=PrefillSignals(queued_seconds=30.0))
    decision = run(signals, fleet(1, 1), policy=policy, gpus=Pair(1, 1))
    assert decision.desired.prefill + decision.desired.decode == 4
    assert "gpuBudget 4" in decision.because.prefill


def test_the_ratio_has_the_last_word() -> None:
    signals = replace(BUSY, prefill=PrefillSignals(queued_seconds=3.0))
    decision = run(
        signals, fleet(1, 2), constrain=lambda s: Pair(s.prefill, max(s.decode, 2 * s.prefill))
    )
    assert (decision.desired.prefill, decision.desired.decode) == (3, 6)
    assert "the ratio changes" in decision.because.decode


def test_pods_that_stay_pending_are_withdrawn() -> None:
    signals = replace(BUSY, prefill=PrefillSignals(queued_seconds=30.0))
    sizes = fleet(1, 1, pending=Pair(3, 0), oldest_pending_seconds=901)
    decision = run(signals, sizes)
    assert decision.desired.prefill == 1
    assert "growth is withdrawn" in decision.capacity_unavailable


def test_one_fewer_is_tried_only_when_one_fewer_would_do() -> None:
    tight = replace(
        BUSY, decode=DecodeSignals(kv_usage=0.5, max_kv_usage=0.6, num_running=8, tbt_seconds=0.03)
    )
    state = ScalerState(Pair(None, 0.0))
    assert run(tight, fleet(1, 2), state).desired.decode == 2
    light = replace(
        BUSY, decode=DecodeSignals(kv_usage=0.2, max_kv_usage=0.2, num_running=8, tbt_seconds=0.01)
    )
    assert run(light, fleet(1, 2), state).desired.decode == 1


@settings(deadline=None)
@given(
    load=st.floats(0, 20),
    kv=st.floats(0, 20),
    prefill=st.integers(1, 8),
    decode=st.integers(1, 8),
)
def test_constant_load_settles_and_stays(load: float, kv: float, prefill: int, decode: int) -> None:
    """A fluid fleet under constant load reaches one size and never leaves it (no flapping)."""
    sizes, state, now = fleet(prefill, decode), ScalerState(), 0.0
    path = []
    for _ in range(120):
        signals = replace(
            BUSY,
            prefill=PrefillSignals(busy_workers=load),
            decode=DecodeSignals(
                kv_usage=min(kv / sizes.totals.decode, 1.0),
                max_kv_usage=min(kv / sizes.totals.decode, 1.0),
                num_running=10,
            ),
        )
        decision = run(signals, sizes, state, now)
        assert 1 <= decision.desired.prefill <= 8
        assert 1 <= decision.desired.decode <= 8
        sizes, state = fleet(*decision.desired), decision.state
        now += 5
        path.append((sizes.totals.prefill, sizes.totals.decode))
    assert len(set(path[-20:])) == 1
    assert decision.desired.prefill >= min(load / 0.8, 8) - 1e-6
    assert decision.desired.decode >= min(kv / 0.85, 8) - 1e-6


@pytest.mark.parametrize("seconds", [0, 30])
def test_the_hold_is_at_least_the_start_up_time(seconds: float) -> None:
    idle = Signals(age_seconds=1)
    sizes = fleet(1, 2, startup_seconds=30)
    decision = run(idle, sizes, ScalerState(Pair(None, 100.0)), 100.0 + seconds)
    assert decision.desired.decode == (2 if seconds < 30 else 1)


def test_a_first_look_does_not_scale_in() -> None:
    state = ScalerState(Pair(None, 0.0))
    fresh = Signals(age_seconds=0, settled=False)
    decision = run(fresh, fleet(1, 4), state)
    assert decision.desired.decode == 4
    assert run(replace(fresh, settled=True), fleet(1, 4), decision.state).desired.decode == 3


def test_nothing_shrinks_while_a_worker_drains() -> None:
    state = ScalerState(Pair(None, 0.0))
    assert run(Signals(age_seconds=0), fleet(1, 4, num_draining=1), state).desired.decode == 4


def test_the_second_pool_waits_for_one_drain_only() -> None:
    state = ScalerState(Pair(0.0, 0.0))
    first = run(Signals(age_seconds=0), fleet(3, 3), state)
    assert (first.desired.prefill, first.desired.decode) == (3, 2)
    second = run(Signals(age_seconds=0), fleet(3, 2), first.state, now=104.0)
    assert (second.desired.prefill, second.desired.decode) == (2, 2)


def test_latency_of_before_the_last_change_is_no_reason_to_grow_more() -> None:
    slow = DecodeSignals(tbt_seconds=0.09, kv_usage=0.3, num_running=50)
    late = PrefillSignals(ttft_seconds=9.0, queued_seconds=0.5)
    signals = replace(BUSY, decode=slow, prefill=late)
    assert run(signals, fleet(1, 2, ages=Pair(math.inf, 5.0))).desired.decode == 2
    assert run(signals, fleet(1, 2, pending=Pair(0, 1))).desired.decode == 3
    assert run(signals, fleet(1, 2, ages=Pair(5.0, math.inf))).desired.prefill == 1
    assert run(signals, fleet(1, 2)).desired.prefill == 2


def test_latency_of_load_that_has_ended_is_neither_cause_nor_infeasible() -> None:
    ended = replace(
        BUSY,
        num_inflight=0,
        decode=DecodeSignals(tbt_seconds=0.09, peak_running=20),
        prefill=PrefillSignals(ttft_seconds=9.0, peak_queued_seconds=4.0),
    )
    decision = run(ended, fleet(2, 2))
    assert (decision.desired.prefill, decision.desired.decode) == (2, 2)
    assert decision.slo_infeasible == ""


def test_withdrawn_growth_is_not_tried_again_at_once() -> None:
    signals = replace(BUSY, prefill=PrefillSignals(queued_seconds=30.0))
    first = run(signals, fleet(1, 1, pending=Pair(3, 0), oldest_pending_seconds=901))
    again = run(signals, fleet(1, 1), first.state, now=104.0)
    assert again.desired.prefill == 1
    assert again.capacity_unavailable
    later = run(signals, fleet(1, 1), again.state, now=1001.0)
    assert later.desired.prefill == 5
    assert not later.capacity_unavailable


def test_a_fixed_ratio_shrinks_by_a_whole_unit() -> None:
    state = ScalerState(Pair(0.0, 0.0))

    def two_to_one(wanted: Pair[int]) -> Pair[int]:
        units = -(-wanted.decode // 2) if wanted.decode != 4 else wanted.prefill
        return Pair(units, 2 * units)

    decision = run(Signals(age_seconds=0), fleet(2, 4), state, constrain=two_to_one)
    assert (decision.desired.prefill, decision.desired.decode) == (1, 2)


def test_a_ratio_does_not_lead_beyond_the_bounds() -> None:
    signals = replace(BUSY, prefill=PrefillSignals(queued_seconds=30.0))
    decision = run(
        signals, fleet(1, 3), constrain=lambda s: Pair(s.prefill, max(s.decode, 3 * s.prefill))
    )
    assert (decision.desired.prefill, decision.desired.decode) == (2, 6)
    assert "limited by pools.max" in decision.because.prefill


def test_zero_is_for_long_idle_services_that_allow_it() -> None:
    policy = AutoscalingPolicySpec.model_validate(
        {
            "pools": {"prefill": {"min": 0}, "decode": {"min": 0}},
            "scaleIn": {"hold": "Fixed", "minHoldSeconds": 0},
            "scaleToZero": {"enabled": True, "idleSeconds": 60},
        }
    )
    state = ScalerState(Pair(0.0, 0.0))
    idle = Signals(age_seconds=0, idle_seconds=30)
    early = run(idle, fleet(1, 1), state, policy=policy)
    assert (early.desired.prefill, early.desired.decode) == (0, 1)
    late = run(replace(idle, idle_seconds=61), fleet(0, 1), state, policy=policy)
    assert (late.desired.prefill, late.desired.decode) == (0, 0)
    woken = run(replace(BUSY, num_inflight=0), fleet(0, 0), policy=policy)
    assert (woken.desired.prefill, woken.desired.decode) == (1, 1)


def zero_policy(**pools: int) -> AutoscalingPolicySpec:
    return AutoscalingPolicySpec.model_validate(
        {
            "pools": {"prefill": {"min": 1, **pools}, "decode": {"min": 1, **pools}},
            "scaleIn": {"hold": "Fixed", "minHoldSeconds": 0},
            "scaleToZero": {"enabled": True, "idleSeconds": 60},
        }
    )


@pytest.mark.parametrize("age", [0.0, math.inf])
def test_a_service_at_zero_stays_there_however_short_its_known_past(age: float) -> None:
    """Whoever has just started to measure knows no idle time: that is no reason to wake it."""
    decision = run(Signals(age_seconds=age), fleet(0, 0), policy=zero_policy())
    assert decision.desired == Pair(0, 0)


@pytest.mark.parametrize("age", [0.0, 5.0, math.inf])
def test_a_request_wakes_a_service_whatever_else_is_unmeasured(age: float) -> None:
    decision = run(Signals(age_seconds=age, wanted=True), fleet(0, 0), policy=zero_policy())
    assert decision.desired == Pair(1, 1)


@pytest.mark.parametrize("age", [0.0, math.inf])
def test_bounds_hold_without_a_measurement(age: float) -> None:
    assert run(Signals(age_seconds=age), fleet(0, 0)).desired == Pair(1, 1)
    above = run(Signals(age_seconds=age), fleet(1, 9))
    assert above.desired == Pair(1, 8)
    both = run(Signals(age_seconds=age), fleet(9, 9))
    assert both.desired == Pair(9, 8), "one drain at a time"


def test_a_woken_service_gets_its_whole_idle_time_to_serve() -> None:
    state, idle = ScalerState(Pair(0.0, 0.0)), Signals(age_seconds=0.0, idle_seconds=900.0)
    starting = run(idle, fleet(1, 0, pending=Pair(0, 1)), state, policy=zero_policy())
    assert starting.desired == Pair(1, 1)
    young = run(idle, fleet(1, 1, ages=Pair(9.0, 9.0)), state, policy=zero_policy())
    assert young.desired == Pair(1, 1)
    old = run(idle, fleet(1, 1, ages=Pair(90.0, 90.0)), state, policy=zero_policy())
    assert old.desired.decode == 0


@given(
    units=st.integers(1, 4),
    idle=st.booleans(),
    queued=st.floats(0, 30),
    busy=st.floats(0, 6),
    kv=st.floats(0, 1),
    tbt=st.none() | st.floats(0.001, 0.5),
    pending=st.integers(0, 1),
)
@settings(deadline=None)
def test_a_fixed_ratio_holds_within_the_bounds(
    units: int, idle: bool, queued: float, busy: float, kv: float, tbt: float | None, pending: int
) -> None:
    ratio = Ratio.model_validate({"mode": "Fixed", "fixed": {"prefill": 1, "decode": 2}})
    last = Pair(units, 2 * units)

    def constrain(sizes: Pair[int]) -> Pair[int]:
        return hold_ratio(ratio, sizes, last)

    signals = replace(
        BUSY,
        requests_per_second=0 if idle else 5,
        num_inflight=0 if idle else 9,
        prefill=PrefillSignals(queued_seconds=queued, busy_workers=busy),
        decode=DecodeSignals(tbt_seconds=tbt, kv_usage=kv, max_kv_usage=kv, num_running=9),
    )
    sizes = fleet(units, 2 * units - pending, pending=Pair(0, pending))
    state = ScalerState(Pair(0.0, 0.0))
    decision = run(signals, sizes, state, constrain=constrain)
    wanted = decision.desired
    assert allows(ratio, wanted)
    assert 1 <= wanted.prefill <= 8
    assert 1 <= wanted.decode <= 8
    if idle and units > 1:
        assert wanted.decode == last.decode - 2
