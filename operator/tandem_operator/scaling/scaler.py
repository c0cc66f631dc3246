"""Runs the autoscaling policies: read the measurements, decide, say what was decided."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import httpx
import structlog
from pydantic import ValidationError

from tandem_operator.api import AutoscalingPolicySpec, InferenceServiceSpec
from tandem_operator.api.autoscaling_policy import PolicyMode
from tandem_operator.api.conditions import ConditionType
from tandem_operator.api.names import PORT_ROUTER_HTTP, RoleLabel
from tandem_operator.api.status import ScalingDecision, ScalingStep
from tandem_operator.autoscaling import Decision, PoolSizes, ScalerState, Signals, decide
from tandem_operator.autoscaling.collector import WINDOW_SECONDS, Collector, Endpoint
from tandem_operator.build.fleet import POOL_ROLES
from tandem_operator.client import Cluster
from tandem_operator.errors import ClusterError, MissingError
from tandem_operator.observed import WORKER_ROLES, Counts, Observed, PolicyDecision
from tandem_operator.ratio import hold_ratio

TICK_SECONDS: Final = 4.0
"""Passes come more often than that; between two ticks the last decision stands."""
NUM_STARTUPS: Final = 50

log = structlog.get_logger("tandem.scaler")


@dataclass
class _Service:
    """What is remembered about one service."""

    collector: Collector
    state: ScalerState = field(default_factory=ScalerState)
    decision: PolicyDecision | None = None
    ticked_at: float = float("-inf")
    measured_at: float = float("-inf")
    startups: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_STARTUPS))
    started: set[str] = field(default_factory=set)
    advised: Counts | None = None
    told: str = ""
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
        self._client = httpx.AsyncClient(trust_env=False)
        self._worker_port = worker_port
        self._router_port = router_port
        self._clock = clock
        self._services: dict[str, _Service] = {}

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def measure(self, observed: Observed) -> Mapping[str, int]:
        """What the routers measured lately, in the fields of `SloStatus`; empty: nothing yet."""
        spec = observed.spec
        if spec is None or observed.deleting_since is not None:
            self._services.pop(observed.uid, None)
            return {}
        service = self._services.get(observed.uid)
        if service is None:
            service = _Service(Collector(self._client, self._clock))
            self._services[observed.uid] = service
        _learn_startups(service, observed)
        now = self._clock()
        if now - service.measured_at >= TICK_SECONDS:
            service.measured_at = now
            policy, _ = await self._policy(observed, spec)
            goal = policy.objectives.percentile if policy is not None else None
            service.signals = await service.collector.read(
                self._routers(observed),
                self._workers(observed, RoleLabel.PREFILL),
                self._workers(observed, RoleLabel.DECODE),
                goal or spec.slo.default_class.percentile,
            )
        return _measured(service.signals)

    async def decide(self, observed: Observed) -> PolicyDecision | None:
        """What the policy of this service wants now; None without a policy. Measure first."""
        spec, service = observed.spec, self._services.get(observed.uid)
        if spec is None or spec.autoscaling is None or service is None:
            return None
        now = self._clock()
        if service.decision is not None and now - service.ticked_at < TICK_SECONDS:
            return _without_news(service.decision)
        service.ticked_at = now
        policy, problem = await self._policy(observed, spec)
        if policy is None:
            service.decision = _unusable(observed, problem)
            return service.decision
        service.decision = await self._tick(observed, spec, policy, service, now)
        if spec.autoscaling.policy_name is not None:
            await self._tell_policy(observed, spec.autoscaling.policy_name, service)
        return service.decision

    async def _policy(
        self, observed: Observed, spec: InferenceServiceSpec
    ) -> tuple[AutoscalingPolicySpec | None, str]:
        chosen = spec.autoscaling
        if chosen is None:
            return None, "spec.autoscaling names no policy"
        if chosen.policy_name is None:
            return chosen.inline, "autoscaling.inline is missing"
        try:
            found = await self._cluster.get(
                "AutoscalingPolicy", chosen.policy_name, observed.namespace
            )
            return AutoscalingPolicySpec.model_validate(found.get("spec", {})), ""
        except MissingError:
            return None, f"AutoscalingPolicy {chosen.policy_name} doesn't exist: create it"
        except ValidationError as error:
            return None, f"AutoscalingPolicy {chosen.policy_name} can't be read: {error}"

    async def _tick(
        self,
        observed: Observed,
        spec: InferenceServiceSpec,
        policy: AutoscalingPolicySpec,
        service: _Service,
        now: float,
    ) -> PolicyDecision:
        default = spec.slo.default_class
        goal = policy.objectives
        last = Counts(*(_wanted(observed, spec, role) for role in WORKER_ROLES))

        def constrain(prefill: int, decode: int) -> tuple[int, int]:
            held = hold_ratio(spec.ratio, Counts(prefill, decode), last)
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
        service.state = decision.state
        active = policy.mode is PolicyMode.ACTIVE
        news = _news(service, decision, last, active=active)
        return PolicyDecision(
            desired=Counts(decision.prefill, decision.decode),
            because=f"prefill: {decision.because_prefill}; decode: {decision.because_decode}",
            active=active,
            conditions=_conditions(decision, active=active),
            decisions=news,
        )

    async def _tell_policy(self, observed: Observed, policy: str, service: _Service) -> None:
        decision = service.decision
        if decision is None or decision.because == service.told:
            return
        try:
            found = await self._cluster.get("AutoscalingPolicy", policy, observed.namespace)
            targets = (found.get("status") or {}).get("targets") or []
            others = [target for target in targets if target.get("name") != observed.name]
            mine = {"name": observed.name, "lastDecision": decision.because[:1024]}
            body = {"status": {"targets": [*others, mine]}}
            await self._cluster.merge(
                "AutoscalingPolicy", policy, observed.namespace, body, subresource="status"
            )
            service.told = decision.because
        except ClusterError as error:
            log.info("policy status was not written", policy=policy, error=str(error))

    def _routers(self, observed: Observed) -> list[Endpoint]:
        port = self._router_port
        return [Endpoint(pod.uid, self._url(pod.ip, port)) for pod in observed.router_pods]

    def _workers(self, observed: Observed, role: RoleLabel) -> list[Endpoint]:
        return [
            Endpoint(pod.uid, self._url(pod.ip, self._worker_port))
            for pod in observed.pods_of(role)
            if pod.ready and pod.live and pod.ip
        ]

    def _url(self, ip: str, port: int) -> str:
        return f"http://[{ip}]:{port}" if ":" in ip else f"http://{ip}:{port}"


def _measured(signals: Signals) -> Mapping[str, int]:
    if signals.age_seconds > WINDOW_SECONDS:
        return {}
    ttft, tbt = signals.prefill.ttft_seconds, signals.decode.tbt_seconds
    measured = {"requests_per_second": round(signals.requests_per_second)}
    if ttft is not None:
        measured["ttft_milliseconds"] = round(ttft * 1000)
    if tbt is not None:
        measured["tbt_milliseconds"] = round(tbt * 1000)
    return measured


def _wanted(observed: Observed, spec: InferenceServiceSpec, role: RoleLabel) -> int:
    pool = observed.pools.get(role)
    if pool is not None and pool.desired is not None:
        return pool.desired
    return (spec.prefill if role is RoleLabel.PREFILL else spec.decode).replicas


def _sizes(observed: Observed, last: Counts, service: _Service) -> PoolSizes:
    # A worker that crashed is on its way back: it counts as pending, not as capacity to give up.
    ready = {
        role: min(
            sum(pod.ready and pod.live for pod in observed.pods_of(role)), max(last.of(role), 0)
        )
        for role in WORKER_ROLES
    }
    now = datetime.now(UTC)
    waiting = [
        (now - pod.created).total_seconds() for pod in observed.pods if pod.live and not pod.started
    ]
    ordered = sorted(service.startups)
    return PoolSizes(
        prefill_ready=ready[RoleLabel.PREFILL],
        decode_ready=ready[RoleLabel.DECODE],
        prefill_pending=last.prefill - ready[RoleLabel.PREFILL],
        decode_pending=last.decode - ready[RoleLabel.DECODE],
        oldest_pending_seconds=max(waiting, default=0.0),
        startup_seconds=ordered[int(0.9 * (len(ordered) - 1))] if ordered else 0.0,
    )


def _learn_startups(service: _Service, observed: Observed) -> None:
    for pod in observed.pods:
        if pod.ready and pod.ready_since is not None and pod.uid not in service.started:
            service.started.add(pod.uid)
            service.startups.append((pod.ready_since - pod.created).total_seconds())
    service.started &= {pod.uid for pod in observed.pods}


def _news(
    service: _Service, decision: Decision, last: Counts, *, active: bool
) -> tuple[ScalingDecision, ...]:
    wanted = Counts(decision.prefill, decision.decode)
    before = last if active else (service.advised or last)
    service.advised = None if active else wanted
    because = {
        RoleLabel.PREFILL: decision.because_prefill,
        RoleLabel.DECODE: decision.because_decode,
    }
    at = datetime.now(UTC).replace(microsecond=0)
    news = []
    for role in WORKER_ROLES:
        if wanted.of(role) == before.of(role):
            continue
        grows = wanted.of(role) > last.of(role)
        how = ScalingStep.START if grows else ScalingStep.DRAIN
        news.append(
            ScalingDecision(
                at=at,
                pool=POOL_ROLES[role],
                from_=last.of(role),
                to=wanted.of(role),
                how=how if active else ScalingStep.ADVISED,
                because=because[role][:1024],
            )
        )
    return tuple(news)


def _conditions(decision: Decision, *, active: bool) -> dict[str, tuple[bool, str, str]]:
    because = f"prefill: {decision.because_prefill}; decode: {decision.because_decode}"
    found = {
        ConditionType.SCALING_ACTIVE: (
            active and not decision.metrics_stale,
            "MetricsStale" if decision.metrics_stale else ("Active" if active else "Advisory"),
            because,
        ),
        ConditionType.METRICS_STALE: (
            decision.metrics_stale,
            "NoMetrics" if decision.metrics_stale else "Fresh",
            decision.because_prefill if decision.metrics_stale else "",
        ),
        ConditionType.SLO_INFEASIBLE: (
            bool(decision.slo_infeasible),
            "Infeasible" if decision.slo_infeasible else "Feasible",
            decision.slo_infeasible,
        ),
        ConditionType.GATED_BY_PEER: (
            bool(decision.gated_by_peer),
            "Gated" if decision.gated_by_peer else "NotGated",
            decision.gated_by_peer,
        ),
    }
    if decision.capacity_unavailable:
        found[ConditionType.CAPACITY_UNAVAILABLE] = (
            True,
            "PendingTooLong",
            decision.capacity_unavailable,
        )
    return {str(kind): parts for kind, parts in found.items()}


def _unusable(observed: Observed, problem: str) -> PolicyDecision:
    kinds = (
        ConditionType.SCALING_ACTIVE,
        ConditionType.METRICS_STALE,
        ConditionType.SLO_INFEASIBLE,
        ConditionType.GATED_BY_PEER,
    )
    judged = (False, "PolicyUnusable", problem)
    return PolicyDecision(
        Counts(0, 0), problem, active=False, conditions={str(kind): judged for kind in kinds}
    )


def _without_news(decision: PolicyDecision) -> PolicyDecision:
    return PolicyDecision(decision.desired, decision.because, decision.active, decision.conditions)
