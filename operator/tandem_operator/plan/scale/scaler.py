"""Measures services and runs their policies: measure, decide, say what was decided."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import httpx
from pydantic import ValidationError

from tandem_operator.api import AutoscalingPolicySpec, InferenceServiceSpec
from tandem_operator.api.autoscaling_policy import PolicyMode
from tandem_operator.api.status import MAX_DECISIONS, ScalingDecision
from tandem_operator.clients.cluster import Cluster
from tandem_operator.errors import MissingError
from tandem_operator.facts.observed import Observed, PolicyDecision
from tandem_operator.facts.scaling import ScalerState
from tandem_operator.facts.signals import Signals
from tandem_operator.names.pods import PORT_ROUTER_HTTP
from tandem_operator.observe.collector import Collector, Endpoint
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.scale.decide import PoolSizes, decide
from tandem_operator.plan.scale.decision import Decision
from tandem_operator.plan.scale.policy_status import PolicyStatusWriter
from tandem_operator.plan.scale.ratio import describe, hold_ratio, reachable
from tandem_operator.plan.scale.telling import judge_decision, tell_changes, untold, unusable

TICK_SECONDS: Final = 4.0
"""Passes come more often than that; between two ticks the last decision stands."""
MEASURE_SECONDS: Final = 10.0
"""The same for a service without a policy, whose routers alone are read."""
NUM_STARTUPS: Final = 50


@dataclass
class _Service:
    """What is remembered about one service."""

    collector: Collector
    state: ScalerState = field(default_factory=ScalerState)
    decision: PolicyDecision | None = None
    ticked_at: float = float("-inf")
    startups: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_STARTUPS))
    started: set[str] = field(default_factory=set)
    advised: Pair[int] | None = None
    entries: tuple[ScalingDecision, ...] = ()  # newest first; told until they are in the status
    policy_name: str = ""  # of the AutoscalingPolicy that was told of this service
    signals: Signals = field(default_factory=Signals)


class PolicyScaler:
    """The `PolicySource` of the operator. Close it at the end."""

    def __init__(
        self,
        cluster: Cluster,
        worker_port: int,
        router_port: int = PORT_ROUTER_HTTP,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        # Pods: never by way of a proxy that the environment names.
        self._client = httpx.AsyncClient(trust_env=False)
        self._worker_port = worker_port
        self._router_port = router_port
        self._clock = clock
        self._services: dict[str, _Service] = {}
        self._policies = PolicyStatusWriter(cluster)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def decide(self, observed: Observed) -> PolicyDecision | None:
        """What the policy of this service wants now; None without a policy. Measures, too."""
        spec = observed.spec
        if spec is None or observed.deleting_since is not None:
            await self._forget(observed)
            return None
        service = self._services.setdefault(
            observed.uid, _Service(Collector(self._client, self._clock))
        )
        await self._leave_old_policy(observed, spec, service)
        _learn_startups(service, observed)
        now = self._clock()
        if spec.autoscaling is None:
            service.decision, service.state = None, ScalerState()
            service.advised, service.entries = None, ()
            if now - service.ticked_at >= MEASURE_SECONDS:
                service.ticked_at = now
                await self._measure(observed, spec, service, ())
            return None
        if service.decision is None or now - service.ticked_at >= TICK_SECONDS:
            service.ticked_at = now
            service.decision = await self._tick(observed, spec, service, now)
        service.entries = untold(service.entries, observed.status.scaling)
        return replace(service.decision, decisions=service.entries)

    def measured(self, observed: Observed) -> Mapping[str, int]:
        """See `PolicySource`."""
        service = self._services.get(observed.uid)
        if service is None or service.signals.age_seconds > 0:
            return {}
        signals = service.signals
        found = {
            "ttft_milliseconds": _milliseconds(signals.prefill.ttft_seconds),
            "tbt_milliseconds": _milliseconds(signals.decode.tbt_seconds),
            "attainment_percent": (
                None if signals.attained_percent is None else int(signals.attained_percent)
            ),
            "requests_per_second": round(signals.requests_per_second),
        }
        return {name: value for name, value in found.items() if value is not None}

    async def _tick(
        self, observed: Observed, spec: InferenceServiceSpec, service: _Service, now: float
    ) -> PolicyDecision:
        policy, stored, problem = await self._policy(observed, spec)
        await self._measure(observed, spec, service, tuple(Role), policy)
        if policy is None:
            return unusable("PolicyUnusable", problem)
        problem = _ratio_problem(spec, policy)
        if problem:
            decision = unusable("RatioUnreachable", problem)
        else:
            decision = _decide(observed, spec, policy, service, now)
        if stored is not None:
            service.policy_name = stored["metadata"]["name"]
            told = replace(decision, decisions=service.entries)
            await self._policies.tell(stored, told, observed)
        return decision

    async def _measure(
        self,
        observed: Observed,
        spec: InferenceServiceSpec,
        service: _Service,
        roles: tuple[Role, ...],
        policy: AutoscalingPolicySpec | None = None,
    ) -> None:
        default = spec.slo.default_class
        routers = [
            Endpoint(pod.uid, self._url(pod.ip, self._router_port)) for pod in observed.router_pods
        ]
        workers = {
            role: [
                Endpoint(pod.uid, self._url(pod.ip, self._worker_port))
                for pod in observed.pods_of(role)
                if role in roles and pod.ready and pod.live and pod.ip
            ]
            for role in Role
        }
        service.signals = await service.collector.read(
            routers,
            workers[Role.PREFILL],
            workers[Role.DECODE],
            (policy.objectives.percentile if policy is not None else None) or default.percentile,
            default.name,
        )

    async def _policy(
        self, observed: Observed, spec: InferenceServiceSpec
    ) -> tuple[AutoscalingPolicySpec | None, dict[str, Any] | None, str]:
        """The policy, the AutoscalingPolicy that it comes from, and why there is none."""
        chosen = spec.autoscaling
        assert chosen is not None, "asked only for services with autoscaling"
        name = chosen.policy_name
        if name is None:
            return chosen.inline, None, "autoscaling has neither policyName nor inline: set one"
        try:
            found = await self._cluster.get("AutoscalingPolicy", name, observed.namespace)
            return AutoscalingPolicySpec.model_validate(found.get("spec", {})), found, ""
        except MissingError:
            problem = f"there is no AutoscalingPolicy {name} in {observed.namespace}: create it"
            return None, None, f"{problem}, or change autoscaling.policyName"
        except ValidationError as error:
            return None, None, f"AutoscalingPolicy {name} can't be read, correct it: {error}"

    async def _leave_old_policy(
        self, observed: Observed, spec: InferenceServiceSpec, service: _Service
    ) -> None:
        named = spec.autoscaling.policy_name if spec.autoscaling is not None else None
        if service.policy_name and service.policy_name != named:
            await self._policies.leave(service.policy_name, observed)
            service.policy_name = ""

    async def _forget(self, observed: Observed) -> None:
        service = self._services.pop(observed.uid, None)
        if service is not None and service.policy_name and observed.deleting_since is not None:
            await self._policies.leave(service.policy_name, observed)

    def _url(self, ip: str, port: int) -> str:
        return f"http://[{ip}]:{port}" if ":" in ip else f"http://{ip}:{port}"


def _decide(
    observed: Observed,
    spec: InferenceServiceSpec,
    policy: AutoscalingPolicySpec,
    service: _Service,
    now: float,
) -> PolicyDecision:
    default, goal = spec.slo.default_class, policy.objectives
    last = Pair(*(_wanted(observed, spec, role) for role in Role))

    def constrain(prefill: int, decode: int) -> tuple[int, int]:
        held = hold_ratio(spec.ratio, Pair(prefill, decode), last)
        return held.prefill, held.decode

    decision = decide(
        policy,
        (goal.ttft_milliseconds or default.ttft_milliseconds) / 1000,
        (goal.tbt_milliseconds or default.tbt_milliseconds) / 1000,
        _sizes(observed, last, service),
        service.signals,
        service.state,
        now,
        constrain,
        (spec.prefill.gpus_per_pod, spec.decode.gpus_per_pod),
    )
    active = policy.mode is PolicyMode.ACTIVE
    at = datetime.now(UTC).replace(microsecond=0)
    fresh = tell_changes(decision, last, service.advised or last, at, active=active)
    service.entries = (*fresh, *service.entries)[:MAX_DECISIONS]
    service.advised = None if active else Pair(decision.prefill, decision.decode)
    service.state = decision.state if active else _advisory_state(decision, last, service.state)
    return PolicyDecision(
        desired=Pair(decision.prefill, decision.decode),
        because=f"prefill: {decision.because_prefill}; decode: {decision.because_decode}",
        active=active,
        conditions=judge_decision(
            decision,
            policy,
            active=active,
            measured=service.signals.age_seconds < float("inf"),
        ),
    )


def _advisory_state(decision: Decision, last: Pair[int], before: ScalerState) -> ScalerState:
    # Advice to shrink is not followed at once: it stands, and its time doesn't start anew.
    state = decision.state
    if decision.prefill < last.prefill:
        state = replace(state, prefill_spare_since=before.prefill_spare_since)
    if decision.decode < last.decode:
        state = replace(state, decode_spare_since=before.decode_spare_since)
    return state


def _ratio_problem(spec: InferenceServiceSpec, policy: AutoscalingPolicySpec) -> str:
    pools = policy.pools
    low = Pair(pools.prefill.min, pools.decode.min)
    high = Pair(pools.prefill.max, pools.decode.max)
    if reachable(spec.ratio, low, high):
        return ""
    return (
        f"no numbers within pools.prefill {low.prefill} to {high.prefill} and pools.decode"
        f" {low.decode} to {high.decode} of the policy keep {describe(spec.ratio)}: widen the"
        " bounds or change spec.ratio"
    )


def _wanted(observed: Observed, spec: InferenceServiceSpec, role: Role) -> int:
    pool = observed.pools.get(role)
    if pool is not None and pool.desired is not None:
        return pool.desired
    return (spec.prefill if role is Role.PREFILL else spec.decode).replicas


def _sizes(observed: Observed, last: Pair[int], service: _Service) -> PoolSizes:
    now = datetime.now(UTC)
    ready, ages = {}, {}
    for role in Role:
        pods = [pod for pod in observed.pods_of(role) if pod.ready and pod.live]
        # A worker that crashed is on its way back: it is pending, not capacity to give up.
        ready[role] = min(len(pods), last.of(role))
        since = [pod.ready_since for pod in pods if pod.ready_since is not None]
        ages[role] = (now - max(since)).total_seconds() if since else float("inf")
    waiting = [
        (now - pod.created).total_seconds() for pod in observed.pods if pod.live and not pod.started
    ]
    ordered = sorted(service.startups)
    return PoolSizes(
        prefill_ready=ready[Role.PREFILL],
        decode_ready=ready[Role.DECODE],
        prefill_pending=last.prefill - ready[Role.PREFILL],
        decode_pending=last.decode - ready[Role.DECODE],
        oldest_pending_seconds=max(waiting, default=0.0),
        startup_seconds=ordered[int(0.9 * (len(ordered) - 1))] if ordered else 0.0,
        num_draining=sum(
            pod.draining_since is not None and pod.failure is None for pod in observed.pods
        ),
        prefill_age_seconds=ages[Role.PREFILL],
        decode_age_seconds=ages[Role.DECODE],
    )


def _learn_startups(service: _Service, observed: Observed) -> None:
    for pod in observed.pods:
        if pod.ready and pod.ready_since is not None and pod.uid not in service.started:
            service.started.add(pod.uid)
            service.startups.append((pod.ready_since - pod.created).total_seconds())
    service.started &= {pod.uid for pod in observed.pods}


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
