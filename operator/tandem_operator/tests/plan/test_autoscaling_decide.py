"""The scaling decision: causes, holds, limits, and that it converges.

Aspects: each pool by its own signal; idle; stale; infeasible; gate; budget; ratio; hold; simulated
to completion under hypothesis.
"""

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
from tandem_operator.plan.scale.decide import PoolSizes, decide
from tandem_operator.plan.scale.decision import Decision
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
    sizes: PoolSizes,
    state: ScalerState | None = None,
    now: float = 100.0,
    policy: AutoscalingPolicySpec = POLICY,
    **more: Any,
) -> Decision:
    return decide(policy, 2.0, 0.05, sizes, signals, state or ScalerState(), now, **more)


def test_a_backlog_of_prompts_grows_prefill_alone() -> None:
    signals = replace(BUSY, prefill=PrefillSignals(ttft_seconds=5.0, queued_seconds=3.0))
    decision = run(signals, PoolSizes(1, 2))
    assert decision.prefill == 3
    assert decision.decode <= 2
    assert "prompts wait" in decision.because_prefill


def test_full_kv_grows_decode_alone() -> None:
    full = DecodeSignals(tbt_seconds=0.04, kv_usage=0.95, max_kv_usage=0.97, num_running=50)
    decision = run(replace(BUSY, decode=full), PoolSizes(1, 2))
    assert (decision.prefill, decision.decode) == (1, 3)
    assert "KV use 95%" in decision.because_decode


def test_slow_tokens_grow_decode_alone() -> None:
    slow = DecodeSignals(tbt_seconds=0.09, kv_usage=0.3, num_running=50)
    decision = run(replace(BUSY, decode=slow), PoolSizes(1, 2))
    assert (decision.prefill, decision.decode) == (1, 4)
    assert "TBT 90 ms > 50 ms" in decision.because_decode


def test_idle_goes_to_the_minimum_one_at_a_time_after_the_hold() -> None:
    idle = Signals(age_seconds=1)
    sizes, state, now = PoolSizes(3, 3), ScalerState(), 0.0
    path = []
    for _ in range(40):
        decision = run(idle, sizes, state, now)
        removed = (sizes.prefill - decision.prefill) + (sizes.decode - decision.decode)
        assert removed in (0, 1)
        sizes = PoolSizes(decision.prefill, decision.decode)
        state, now = decision.state, now + 5
        path.append((sizes.prefill, sizes.decode))
    assert path[0] == (3, 3)
    assert path[-1] == (1, 1)


def test_stale_metrics_hold() -> None:
    signals = replace(BUSY, age_seconds=31, prefill=PrefillSignals(queued_seconds=100))
    decision = run(signals, PoolSizes(2, 3))
    assert (decision.prefill, decision.decode) == (2, 3)
    assert decision.metrics_stale
    assert "no complete metrics for more than 30 s" in decision.because_prefill


def test_a_prompt_that_alone_breaks_the_objective_does_not_scale() -> None:
    signals = replace(BUSY, prefill=PrefillSignals(ttft_seconds=9.0))
    decision = run(signals, PoolSizes(2, 2))
    assert decision.prefill == 2
    assert "more workers would not help" in decision.slo_infeasible


def test_prefill_is_gated_while_decode_is_the_cause() -> None:
    signals = replace(
        BUSY,
        prefill=PrefillSignals(ttft_seconds=6.0, busy_workers=1.5, queued_seconds=0.1),
        decode=DecodeSignals(kv_usage=0.99, max_kv_usage=1.0, num_running=9, num_waiting=5),
    )
    decision = run(signals, PoolSizes(1, 1))
    assert decision.prefill == 1
    assert decision.decode == 2
    assert decision.gated_by_peer


def test_the_gpu_budget_limits_growth() -> None:
    policy = POLICY.model_copy(
        update={"coordination": POLICY.coordination.model_copy(update={"gpu_budget": 4})}
    )
    signals = replace(BUSY, prefill=PrefillSignals(queued_seconds=30.0))
    decision = run(signals, PoolSizes(1, 1), policy=policy, gpus_per_worker=(1, 1))
    assert decision.prefill + decision.decode == 4
    assert "gpuBudget 4" in decision.because_prefill


def test_the_ratio_has_the_last_word() -> None:
    signals = replace(BUSY, prefill=PrefillSignals(queued_seconds=3.0))
    decision = run(signals, PoolSizes(1, 2), constrain=lambda p, d: (p, max(d, 2 * p)))
    assert (decision.prefill, decision.decode) == (3, 6)
    assert "the ratio makes" in decision.because_decode


def test_pods_that_stay_pending_are_withdrawn() -> None:
    signals = replace(BUSY, prefill=PrefillSignals(queued_seconds=30.0))
    sizes = PoolSizes(1, 1, prefill_pending=3, oldest_pending_seconds=901)
    decision = run(signals, sizes)
    assert decision.prefill == 1
    assert "growth is withdrawn" in decision.capacity_unavailable


def test_one_fewer_is_tried_only_when_one_fewer_would_do() -> None:
    tight = replace(
        BUSY, decode=DecodeSignals(kv_usage=0.5, max_kv_usage=0.6, num_running=8, tbt_seconds=0.03)
    )
    state = ScalerState(decode_spare_since=0.0)
    assert run(tight, PoolSizes(1, 2), state).decode == 2
    light = replace(
        BUSY, decode=DecodeSignals(kv_usage=0.2, max_kv_usage=0.2, num_running=8, tbt_seconds=0.01)
    )
    assert run(light, PoolSizes(1, 2), state).decode == 1


@settings(deadline=None)
@given(
    load=st.floats(0, 20),
    kv=st.floats(0, 20),
    prefill=st.integers(1, 8),
    decode=st.integers(1, 8),
)
def test_constant_load_settles_and_stays(load: float, kv: float, prefill: int, decode: int) -> None:
    """A fluid fleet under constant load reaches one size and never leaves it (no flapping)."""
    sizes, state, now = PoolSizes(prefill, decode), ScalerState(), 0.0
    path = []
    for _ in range(120):
        signals = replace(
            BUSY,
            prefill=PrefillSignals(busy_workers=load),
            decode=DecodeSignals(
                kv_usage=min(kv / sizes.decode, 1.0),
                max_kv_usage=min(kv / sizes.decode, 1.0),
                num_running=10,
            ),
        )
        decision = run(signals, sizes, state, now)
        assert 1 <= decision.prefill <= 8
        assert 1 <= decision.decode <= 8
        sizes, state = PoolSizes(decision.prefill, decision.decode), decision.state
        now += 5
        path.append((sizes.prefill, sizes.decode))
    assert len(set(path[-20:])) == 1
    assert decision.prefill >= min(load / 0.8, 8) - 1e-6
    assert decision.decode >= min(kv / 0.85, 8) - 1e-6


@pytest.mark.parametrize("seconds", [0, 30])
def test_the_hold_is_at_least_the_start_up_time(seconds: float) -> None:
    idle = Signals(age_seconds=1)
    sizes = PoolSizes(1, 2, startup_seconds=30)
    decision = run(idle, sizes, ScalerState(decode_spare_since=100.0), 100.0 + seconds)
    assert decision.decode == (2 if seconds < 30 else 1)


def test_a_first_look_does_not_scale_in() -> None:
    state = ScalerState(decode_spare_since=0.0)
    fresh = Signals(age_seconds=0, settled=False)
    decision = run(fresh, PoolSizes(1, 4), state)
    assert decision.decode == 4
    assert run(replace(fresh, settled=True), PoolSizes(1, 4), decision.state).decode == 3


def test_nothing_shrinks_while_a_worker_drains() -> None:
    state = ScalerState(decode_spare_since=0.0)
    assert run(Signals(age_seconds=0), PoolSizes(1, 4, num_draining=1), state).decode == 4


def test_the_second_pool_waits_for_one_drain_only() -> None:
    state = ScalerState(prefill_spare_since=0.0, decode_spare_since=0.0)
    first = run(Signals(age_seconds=0), PoolSizes(3, 3), state)
    assert (first.prefill, first.decode) == (3, 2)
    second = run(Signals(age_seconds=0), PoolSizes(3, 2), first.state, now=104.0)
    assert (second.prefill, second.decode) == (2, 2)


def test_latency_of_before_the_last_change_is_no_reason_to_grow_more() -> None:
    slow = DecodeSignals(tbt_seconds=0.09, kv_usage=0.3, num_running=50)
    late = PrefillSignals(ttft_seconds=9.0, queued_seconds=0.5)
    signals = replace(BUSY, decode=slow, prefill=late)
    assert run(signals, PoolSizes(1, 2, decode_age_seconds=5.0)).decode == 2
    assert run(signals, PoolSizes(1, 2, decode_pending=1)).decode == 3
    assert run(signals, PoolSizes(1, 2, prefill_age_seconds=5.0)).prefill == 1
    assert run(signals, PoolSizes(1, 2)).prefill == 2


def test_latency_of_load_that_has_ended_is_neither_cause_nor_infeasible() -> None:
    ended = replace(
        BUSY,
        num_inflight=0,
        decode=DecodeSignals(tbt_seconds=0.09, peak_running=20),
        prefill=PrefillSignals(ttft_seconds=9.0, peak_queued_seconds=4.0),
    )
    decision = run(ended, PoolSizes(2, 2))
    assert (decision.prefill, decision.decode) == (2, 2)
    assert decision.slo_infeasible == ""


def test_withdrawn_growth_is_not_tried_again_at_once() -> None:
    signals = replace(BUSY, prefill=PrefillSignals(queued_seconds=30.0))
    first = run(signals, PoolSizes(1, 1, prefill_pending=3, oldest_pending_seconds=901))
    again = run(signals, PoolSizes(1, 1), first.state, now=104.0)
    assert again.prefill == 1
    assert again.capacity_unavailable
    later = run(signals, PoolSizes(1, 1), again.state, now=1001.0)
    assert later.prefill == 5
    assert not later.capacity_unavailable


def test_a_fixed_ratio_shrinks_by_a_whole_unit() -> None:
    state = ScalerState(prefill_spare_since=0.0, decode_spare_since=0.0)

    def two_to_one(prefill: int, decode: int) -> tuple[int, int]:
        units = -(-decode // 2) if decode != 4 else prefill
        return units, 2 * units

    decision = run(Signals(age_seconds=0), PoolSizes(2, 4), state, constrain=two_to_one)
    assert (decision.prefill, decision.decode) == (1, 2)


def test_a_ratio_does_not_lead_beyond_the_bounds() -> None:
    signals = replace(BUSY, prefill=PrefillSignals(queued_seconds=30.0))
    decision = run(signals, PoolSizes(1, 3), constrain=lambda p, d: (p, max(d, 3 * p)))
    assert (decision.prefill, decision.decode) == (2, 6)
    assert "limited by pools.max" in decision.because_prefill


def test_zero_is_for_long_idle_services_that_allow_it() -> None:
    policy = AutoscalingPolicySpec.model_validate(
        {
            "pools": {"prefill": {"min": 0}, "decode": {"min": 0}},
            "scaleIn": {"hold": "Fixed", "minHoldSeconds": 0},
            "scaleToZero": {"enabled": True, "idleSeconds": 60},
        }
    )
    state = ScalerState(prefill_spare_since=0.0, decode_spare_since=0.0)
    idle = Signals(age_seconds=0, idle_seconds=30)
    early = run(idle, PoolSizes(1, 1), state, policy=policy)
    assert (early.prefill, early.decode) == (0, 1)
    late = run(replace(idle, idle_seconds=61), PoolSizes(0, 1), state, policy=policy)
    assert (late.prefill, late.decode) == (0, 0)
    woken = run(replace(BUSY, num_inflight=0), PoolSizes(0, 0), policy=policy)
    assert (woken.prefill, woken.decode) == (1, 1)


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

    def constrain(prefill: int, decode: int) -> tuple[int, int]:
        held = hold_ratio(ratio, Pair(prefill, decode), last)
        return held.prefill, held.decode

    signals = replace(
        BUSY,
        requests_per_second=0 if idle else 5,
        num_inflight=0 if idle else 9,
        prefill=PrefillSignals(queued_seconds=queued, busy_workers=busy),
        decode=DecodeSignals(tbt_seconds=tbt, kv_usage=kv, max_kv_usage=kv, num_running=9),
    )
    sizes = PoolSizes(units, 2 * units - pending, decode_pending=pending)
    state = ScalerState(prefill_spare_since=0.0, decode_spare_since=0.0)
    decision = run(signals, sizes, state, constrain=constrain)
    wanted = Pair(decision.prefill, decision.decode)
    assert allows(ratio, wanted)
    assert 1 <= wanted.prefill <= 8
    assert 1 <= wanted.decode <= 8
    if idle and units > 1:
        assert wanted.decode == last.decode - 2
