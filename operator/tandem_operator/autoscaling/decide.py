"""The pure function: policy, sizes, signals and time in; one decision for both pools out.

Each pool has its own cause to grow. Prefill: the backlog that waits, the work that arrives, and
TTFT as the check. Decode: KV in use, requests without room, and TBT as the check. Neither looks at
the utilisation of a GPU, which is high at any load. A pool shrinks by one at a time, only after the
same rules hold for one worker fewer, and only after that was so for the hold time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from tandem_operator.api.autoscaling_policy import (
    AutoscalingPolicySpec,
    CoordinationMode,
    HoldMode,
    OnDeadline,
    PoolBounds,
)
from tandem_operator.autoscaling.decision import Decision
from tandem_operator.autoscaling.signals import Signals
from tandem_operator.autoscaling.state import ScalerState

TOLERANCE = 0.10
"""Latency may exceed its objective by this share before a pool grows."""
TARGET_BUSY = 0.8
"""Share of a prefill worker's time that arriving work should take at most."""
SPARE = 0.8
"""A smaller pool must stay below this share of every limit, else it is not tried."""
BACKLOG_SHARE = 0.5
"""Part of the TTFT objective within which the backlog should be worked off."""


@dataclass(frozen=True)
class PoolSizes:
    """Both pools as they are: ready workers, and those on their way (with the oldest's age)."""

    prefill_ready: int
    decode_ready: int
    prefill_pending: int = 0
    decode_pending: int = 0
    oldest_pending_seconds: float = 0.0
    startup_seconds: float = 0.0  # measured p90; 0: unknown

    @property
    def prefill(self) -> int:
        """Prefill workers, ready or on their way."""
        return self.prefill_ready + self.prefill_pending

    @property
    def decode(self) -> int:
        """Decode workers, ready or on their way."""
        return self.decode_ready + self.decode_pending


@dataclass(frozen=True)
class _Want:
    """What one pool needs: enough for now, or fewer if `spare`, each with its reason."""

    size: int
    because: str
    spare: bool = False
    infeasible: str = ""


def decide(
    policy: AutoscalingPolicySpec,
    ttft_seconds: float,
    tbt_seconds: float,
    sizes: PoolSizes,
    signals: Signals,
    state: ScalerState,
    now: float,
    constrain: Callable[[int, int], tuple[int, int]] = lambda prefill, decode: (prefill, decode),
    gpus_per_worker: tuple[int, int] = (0, 0),
) -> Decision:
    """Sizes for both pools.

    `ttft_seconds` and `tbt_seconds` are the objectives in force. `constrain` applies the service's
    ratio to (prefill, decode). `gpus_per_worker` are the GPUs of one worker of each pool, for the
    budget.
    """
    if signals.age_seconds > policy.signals.stale_seconds:
        why = f"held: no metrics for {_seconds(signals.age_seconds)}"
        held = replace(state, prefill_spare_since=None, decode_spare_since=None)
        return Decision(sizes.prefill, sizes.decode, why, why, held, metrics_stale=True)
    prefill = _want_prefill(policy, ttft_seconds, sizes, signals)
    decode = _want_decode(policy, tbt_seconds, sizes, signals)
    gated = ""
    if (
        policy.coordination.mode == CoordinationMode.BOTTLENECK
        and prefill.size > sizes.prefill
        and decode.size > sizes.decode
        and signals.prefill.queued_seconds < BACKLOG_SHARE * ttft_seconds
        and signals.decode.num_waiting > 0
    ):
        gated = "prefill waits for decode: requests have no room there, and no prompt is queued"
        prefill = _Want(sizes.prefill, gated)
    withdrawn = _withdraw(policy, sizes)
    if withdrawn:
        prefill = _Want(min(prefill.size, sizes.prefill_ready), withdrawn)
        decode = _Want(min(decode.size, sizes.decode_ready), withdrawn)
    hold = _hold_seconds(policy, sizes)
    pools = policy.pools
    size_p, why_p, since_p = _settle(
        prefill, sizes.prefill, pools.prefill, state.prefill_spare_since, now, hold
    )
    size_d, why_d, since_d = _settle(
        decode, sizes.decode, pools.decode, state.decode_spare_since, now, hold
    )
    size_p, size_d, limited = _coordinate(
        policy, sizes, (size_p, size_d), constrain, gpus_per_worker
    )
    return Decision(
        size_p,
        size_d,
        f"{why_p}{limited}",
        f"{why_d}{limited}",
        ScalerState(since_p, since_d),
        slo_infeasible=prefill.infeasible or decode.infeasible,
        gated_by_peer=gated,
        capacity_unavailable=withdrawn,
    )


def _want_prefill(
    policy: AutoscalingPolicySpec, objective: float, sizes: PoolSizes, signals: Signals
) -> _Want:
    seen, count = signals.prefill, max(sizes.prefill, 1)
    if signals.idle:
        return _Want(policy.pools.prefill.min, _idle(signals), spare=True)
    backlog = math.ceil(seen.queued_seconds / (BACKLOG_SHARE * objective))
    arriving = math.ceil(seen.busy_workers / TARGET_BUSY)
    standby = policy.burst.standby.prefill
    wants = [
        (
            backlog + standby,
            f"{_seconds(seen.queued_seconds)} of prompts wait, objective {_seconds(objective)}",
        ),
        (
            arriving + standby,
            f"arriving prompts take {seen.busy_workers:.1f} workers' whole time",
        ),
    ]
    ttft = seen.ttft_seconds
    if ttft is not None and ttft > objective * (1 + TOLERANCE):
        text = f"TTFT {_seconds(ttft)} > {_seconds(objective)}"
        queueing = seen.queued_seconds > 0 or seen.busy_workers > 0.5 * count
        if not queueing:
            why = f"{text} although no prompt waits: more workers would not help"
            return _Want(sizes.prefill, why, infeasible=why)
        wants.append((math.ceil(count * min(ttft / objective, 2.0)), text))
    size, why = max(wants)
    if size > sizes.prefill:
        return _Want(size, why)
    fewer = count - 1
    enough = fewer >= 1 and (
        seen.busy_workers <= SPARE * TARGET_BUSY * fewer
        and seen.queued_seconds <= SPARE * BACKLOG_SHARE * objective * fewer
        and (ttft is None or ttft * count / fewer <= SPARE * objective)
        and fewer >= standby
    )
    if enough:
        return _Want(fewer, f"{fewer} would do: {seen.busy_workers:.1f} busy", spare=True)
    return _Want(sizes.prefill, "prefill is sized right")


def _want_decode(
    policy: AutoscalingPolicySpec, objective: float, sizes: PoolSizes, signals: Signals
) -> _Want:
    seen, count = signals.decode, max(sizes.decode, 1)
    ready = max(sizes.decode_ready, 1)
    if signals.idle:
        return _Want(policy.pools.decode.min, _idle(signals), spare=True)
    ceiling = policy.pools.decode.kv_ceiling_percent / 100
    used = seen.kv_usage * ready  # in workers' worth of KV
    standby = policy.burst.standby.decode
    wants = [
        (
            math.ceil(used / ceiling) + standby,
            f"KV use {seen.kv_usage:.0%} of {ready} workers, ceiling {ceiling:.0%}",
        )
    ]
    if seen.num_waiting > 0 and seen.max_kv_usage > SPARE * ceiling:
        wants.append((count + 1, f"{seen.num_waiting} requests have no room in decode"))
    tbt = seen.tbt_seconds
    if tbt is not None and tbt > objective * (1 + TOLERANCE):
        text = f"TBT {_seconds(tbt)} > {_seconds(objective)}"
        if seen.num_running <= ready and seen.num_waiting == 0:
            why = f"{text} with at most one stream per worker: more workers would not help"
            return _Want(sizes.decode, why, infeasible=why)
        wants.append((math.ceil(ready * min(tbt / objective, 2.0)), text))
    size, why = max(wants)
    if size > sizes.decode:
        return _Want(size, why)
    fewer = count - 1
    enough = fewer >= 1 and (
        used <= SPARE * ceiling * fewer
        and seen.num_waiting == 0
        and (tbt is None or tbt * count / fewer <= SPARE * objective)
        and fewer >= standby
    )
    if enough:
        return _Want(fewer, f"{fewer} would do: KV use {seen.kv_usage:.0%}", spare=True)
    return _Want(sizes.decode, "decode is sized right")


def _settle(
    want: _Want,
    current: int,
    bounds: PoolBounds,
    spare_since: float | None,
    now: float,
    hold: float,
) -> tuple[int, str, float | None]:
    """Bounds, step up, and the wait before a step down: (size, reason, spare since)."""
    target = min(max(want.size, bounds.min), bounds.max)
    if target > current:
        size = min(target, current + bounds.max_step_up)
        return size, want.because, None
    if current > bounds.max:
        return current - 1, f"above pools.max {bounds.max}", None
    if target == current or not want.spare:
        at_max = want.size > target == current
        return (
            (current, f"{want.because}; at its maximum {bounds.max}", None)
            if at_max
            else (min(current, max(target, bounds.min)), want.because, None)
        )
    since = now if spare_since is None else spare_since
    left = hold - (now - since)
    if left > 0:
        return current, f"{want.because}; held for another {_seconds(left)}", since
    return current - 1, want.because, now


def _coordinate(
    policy: AutoscalingPolicySpec,
    sizes: PoolSizes,
    wanted: tuple[int, int],
    constrain: Callable[[int, int], tuple[int, int]],
    gpus: tuple[int, int],
) -> tuple[int, int, str]:
    """One drain at a time, the ratio, and the GPU budget: (prefill, decode, what limited it)."""
    prefill, decode = wanted
    if prefill < sizes.prefill and decode < sizes.decode:
        prefill = sizes.prefill  # decode first; the next tick takes the other
    budget = policy.coordination.gpu_budget
    limited = ""
    while budget and prefill * gpus[0] + decode * gpus[1] > budget:
        grown_p, grown_d = prefill - sizes.prefill, decode - sizes.decode
        if grown_p <= 0 and grown_d <= 0:
            break
        if grown_p >= grown_d:
            prefill -= 1
        else:
            decode -= 1
        limited = f"; limited by coordination.gpuBudget {budget}"
    bound = constrain(prefill, decode)
    if bound != (prefill, decode):
        limited += f"; the ratio makes {prefill}:{decode} into {bound[0]}:{bound[1]}"
    return *bound, limited


def _hold_seconds(policy: AutoscalingPolicySpec, sizes: PoolSizes) -> float:
    """Rent or buy: an idle worker is kept until its idle cost equals the cost of its restart."""
    hold = float(policy.scale_in.min_hold_seconds)
    if policy.scale_in.hold == HoldMode.RENT_OR_BUY:
        hold = max(hold, sizes.startup_seconds)
    return hold


def _withdraw(policy: AutoscalingPolicySpec, sizes: PoolSizes) -> str:
    limit = policy.startup.pending_deadline_seconds
    if policy.startup.on_deadline != OnDeadline.WITHDRAW or sizes.oldest_pending_seconds <= limit:
        return ""
    return (
        f"a pod has been pending for {_seconds(sizes.oldest_pending_seconds)} "
        f"(startup.pendingDeadlineSeconds {limit}): growth withdrawn"
    )


def _idle(signals: Signals) -> str:
    return f"idle for {_seconds(signals.idle_seconds)}"


def _seconds(value: float) -> str:
    if value == math.inf:
        return "ever"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
