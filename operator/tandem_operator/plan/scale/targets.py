"""Merges the owners of `replicas` into one number per pool.

One owner at a time: an active policy; else whoever wrote last, the user (the service's spec) or an
outside scaler (the pool's `/scale`). The pool remembers in an annotation the spec number that was
last carried over: a different one in the spec is a new edit by the user and wins; a different one
in the pool is a write to `/scale` and wins until the next edit. Whatever the owner wants passes the
ratio before it counts, and when the ratio changes a number the pool's own number is set to the
result, so that `kubectl get` and an HPA show the real number.
"""

from dataclasses import dataclass

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.ratio import RatioMode
from tandem_operator.api.status import ScaledBy
from tandem_operator.facts.observed import Observed, PoolView
from tandem_operator.facts.scaling import PolicyDecision
from tandem_operator.pair import Pair
from tandem_operator.plan.scale.ratio import describe, hold_ratio


@dataclass(frozen=True)
class PoolTarget:
    """What one pool works towards.

    `replicas` goes into the pool's spec, `spec_replicas` into its annotation; they differ after a
    write to `/scale`. `ignored` explains a write that has no effect or was held back.
    """

    desired: int
    replicas: int
    spec_replicas: int
    scaled_by: ScaledBy
    ignored_replicas: int | None = None
    ignored: str = ""


@dataclass(frozen=True)
class _Claim:
    wanted: int
    spec_replicas: int
    scaled_by: ScaledBy


def plan_targets(
    spec: InferenceServiceSpec, observed: Observed, decision: PolicyDecision | None = None
) -> Pair[PoolTarget]:
    """The numbers to work towards in both pools. `decision` is the policy's, if there is one."""
    claims = Pair.build(lambda role: _claim(spec.pool(role).replicas, observed.pools.of(role)))
    by_owner = claims.map(lambda claim: claim.wanted)
    last = Pair.build(lambda role: _last(observed.pools.of(role), by_owner.of(role)))
    if decision is not None and decision.active:
        held = hold_ratio(spec.ratio, decision.desired, last)
        return Pair.build(lambda role: _by_policy(claims.of(role), held.of(role)))
    held = hold_ratio(spec.ratio, by_owner, last)
    return Pair.build(
        lambda role: _by_owner(spec, claims.of(role), held.of(role), observed.pools.of(role))
    )


def _last(pool: PoolView | None, default: int) -> int:
    return default if pool is None or pool.desired is None else pool.desired


def _claim(in_spec: int, pool: PoolView | None) -> _Claim:
    if pool is None or pool.spec_replicas is None or pool.spec_replicas != in_spec:
        return _Claim(in_spec, in_spec, ScaledBy.USER)
    external = pool.replicas != pool.spec_replicas
    return _Claim(pool.replicas, in_spec, ScaledBy.EXTERNAL if external else ScaledBy.USER)


def _by_policy(claim: _Claim, desired: int) -> PoolTarget:
    external = claim.scaled_by is ScaledBy.EXTERNAL and claim.wanted != desired
    return PoolTarget(
        desired=desired,
        replicas=claim.wanted,
        spec_replicas=claim.spec_replicas,
        scaled_by=ScaledBy.POLICY,
        ignored_replicas=claim.wanted if external else None,
        ignored=(
            f"{claim.wanted}: an autoscaling policy is active; it takes effect when the policy"
            " becomes Advisory or is removed"
            if external
            else ""
        ),
    )


def _by_owner(
    spec: InferenceServiceSpec, claim: _Claim, desired: int, pool: PoolView | None
) -> PoolTarget:
    ignored = pool.ignored_scale if pool is not None else ""
    if claim.wanted != desired:
        follows = spec.ratio.mode is RatioMode.FIXED and (
            pool is not None and pool.desired == claim.wanted
        )
        ignored = (
            "" if follows else f"{claim.wanted}: {describe(spec.ratio)} changes it to {desired}"
        )
    elif pool is not None and pool.desired not in (None, desired):
        ignored = ""  # a later write went through
    return PoolTarget(desired, desired, claim.spec_replicas, claim.scaled_by, None, ignored)
