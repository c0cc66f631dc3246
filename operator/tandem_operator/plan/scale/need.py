"""What each pool needs, by its own signals.

Prefill: the backlog that waits, the work that arrives, and TTFT as the check. Decode: KV in use,
requests without room, and TBT as the check. Neither looks at the utilisation of a GPU, which is
high at any load.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tandem_operator.api.autoscaling_policy import AutoscalingPolicySpec
from tandem_operator.facts.scaling import ScalerState
from tandem_operator.facts.signals import WINDOW_SECONDS, Signals
from tandem_operator.pair import Pair

TOLERANCE = 0.10
"""Latency may exceed its objective by this share before a pool grows."""
TARGET_BUSY = 0.8
"""Share of a prefill worker's time that arriving work should take at most."""
SPARE = 0.8
"""A smaller pool must stay below this share of every limit, else it is not tried."""
BACKLOG_SHARE = 0.5
"""Part of the TTFT objective within which the backlog should be worked off."""

IDLE = "no requests arrive and none are running"


@dataclass(frozen=True)
class PoolSize:
    """One pool as it is: ready workers and workers on their way."""

    ready: int
    pending: int = 0
    age_seconds: float = math.inf  # since the newest worker became ready

    @property
    def total(self) -> int:
        """Workers, ready or on their way."""
        return self.ready + self.pending

    @property
    def settled(self) -> bool:
        """All latencies in the window were measured with the workers that are there now."""
        return self.pending == 0 and self.age_seconds >= WINDOW_SECONDS


@dataclass(frozen=True)
class Sizes:
    """Both pools as they are, with facts that concern both."""

    pools: Pair[PoolSize]
    oldest_pending_seconds: float = 0.0
    startup_seconds: float = 0.0  # measured p90; 0: unknown
    num_draining: int = 0  # workers of both pools that finish their streams

    @property
    def totals(self) -> Pair[int]:
        """Workers of both pools, ready or on their way."""
        return self.pools.map(lambda pool: pool.total)


@dataclass(frozen=True)
class Situation:
    """Everything that one decision depends on, except the time.

    `objectives` are TTFT for prefill and TBT for decode, in seconds. `constrain` applies the
    service's ratio to sizes. `gpus` are the GPUs of one worker of each pool, for the budget.
    """

    policy: AutoscalingPolicySpec
    objectives: Pair[float]
    sizes: Sizes
    signals: Signals
    state: ScalerState
    constrain: Callable[[Pair[int]], Pair[int]] = lambda sizes: sizes
    gpus: Pair[int] = Pair(0, 0)


@dataclass(frozen=True)
class Need:
    """What one pool needs: enough for now, or fewer workers if `spare`, with the reason."""

    size: int
    because: str
    spare: bool = False
    infeasible: str = ""


def need_prefill(at: Situation, minimum: int) -> Need:
    """The size of the prefill pool that its signals ask for."""
    seen, pool, objective = at.signals.prefill, at.sizes.pools.prefill, at.objectives.prefill
    if at.signals.idle:
        return Need(minimum, IDLE, spare=True)
    count = max(pool.total, 1)
    standby = at.policy.burst.standby.prefill
    backlog = math.ceil(seen.queued_seconds / (BACKLOG_SHARE * objective))
    arriving = math.ceil(seen.busy_workers / TARGET_BUSY)
    waiting = (
        f"{seconds(seen.queued_seconds)} of prompts are waiting, objective {seconds(objective)}"
    )
    busy = f"arriving prompts take the whole time of {seen.busy_workers:.1f} workers"
    wants = [(backlog + standby, waiting), (arriving + standby, busy)]
    ttft = seen.ttft_seconds
    if pool.settled and ttft is not None and ttft > objective * (1 + TOLERANCE):
        text = f"TTFT {seconds(ttft)} > {seconds(objective)}"
        peak = max(seen.queued_seconds, seen.peak_queued_seconds)
        if peak == 0 and seen.busy_workers <= 0.5 * count:
            why = f"{text} although no prompt waits: more workers would not help"
            return Need(pool.total, why, infeasible=why)
        if at.signals.num_inflight > 0:  # else the latency is of earlier load
            wants.append((math.ceil(count * min(ttft / objective, 2.0)), text))
    size, why = max(wants)
    if size > pool.total:
        return Need(size, why)

    def enough(fewer: int) -> bool:
        return fewer >= standby and (
            seen.busy_workers <= SPARE * TARGET_BUSY * fewer
            and seen.queued_seconds <= SPARE * BACKLOG_SHARE * objective * fewer
            and (ttft is None or ttft * count / fewer <= SPARE * objective)
        )

    fewer = _fewest(count, enough)
    if fewer < count:
        return Need(fewer, f"{fewer} would be enough: {seen.busy_workers:.1f} are busy", spare=True)
    return Need(pool.total, "prefill has the right size")


def need_decode(at: Situation, minimum: int) -> Need:
    """The size of the decode pool that its signals ask for."""
    seen, pool, objective = at.signals.decode, at.sizes.pools.decode, at.objectives.decode
    if at.signals.idle:
        return Need(minimum, IDLE, spare=True)
    count, ready = max(pool.total, 1), max(pool.ready, 1)
    ceiling = at.policy.pools.decode.kv_ceiling_percent / 100
    used = seen.kv_usage * ready  # in workers' worth of KV
    standby = at.policy.burst.standby.decode
    usage = f"KV use {seen.kv_usage:.0%} of {ready} workers, ceiling {ceiling:.0%}"
    wants = [(math.ceil(used / ceiling) + standby, usage)]
    if seen.num_waiting > 0 and seen.max_kv_usage > SPARE * ceiling:
        wants.append((count + 1, f"{seen.num_waiting} requests have no room in decode"))
    tbt = seen.tbt_seconds
    if pool.settled and tbt is not None and tbt > objective * (1 + TOLERANCE):
        text = f"TBT {seconds(tbt)} > {seconds(objective)}"
        if seen.num_running <= ready and seen.peak_running <= 1 and seen.num_waiting == 0:
            why = f"{text} with at most one stream per worker: more workers would not help"
            return Need(pool.total, why, infeasible=why)
        if seen.num_running > 0:  # else the latency is of earlier load
            wants.append((math.ceil(ready * min(tbt / objective, 2.0)), text))
    size, why = max(wants)
    if size > pool.total:
        return Need(size, why)

    def enough(fewer: int) -> bool:
        return fewer >= standby and (
            used <= SPARE * ceiling * fewer
            and seen.num_waiting == 0
            and (tbt is None or tbt * count / fewer <= SPARE * objective)
        )

    fewer = _fewest(count, enough)
    if fewer < count:
        return Need(fewer, f"{fewer} would be enough: KV use {seen.kv_usage:.0%}", spare=True)
    return Need(pool.total, "decode has the right size")


def seconds(value: float) -> str:
    """A time as text, in milliseconds below one second."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _fewest(count: int, enough: Callable[[int], bool]) -> int:
    """The smallest size, from `count` down and never zero, up to which each one is enough."""
    while count > 1 and enough(count - 1):
        count -= 1
    return count
