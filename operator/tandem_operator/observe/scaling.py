"""Takes the facts about scaling: measures a service, reads its policy, remembers its past."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog
from pydantic import ValidationError

from tandem_operator.api import (
    AutoscalingPolicySpec,
    AutoscalingPolicyStatus,
    InferenceServiceSpec,
)
from tandem_operator.api.autoscaling_policy import Autoscaling, PolicyTarget
from tandem_operator.clients.cluster import Cluster, JsonObject
from tandem_operator.clients.workers import WorkerClient
from tandem_operator.errors import ClusterError, MissingError
from tandem_operator.facts.observed import Observed, PodAddress
from tandem_operator.facts.scaling import (
    MEASURE_SECONDS,
    TICK_SECONDS,
    PolicyView,
    Reading,
    Scaling,
    ScalingMemory,
)
from tandem_operator.facts.signals import Signals
from tandem_operator.facts.worker import WorkerPod
from tandem_operator.names.objects import AUTOSCALING_POLICY
from tandem_operator.observe.collector import Collector, Latency
from tandem_operator.observe.objects import problems
from tandem_operator.pair import Pair

NUM_STARTUPS: Final = 50

log = structlog.get_logger("tandem.scaling")


@dataclass
class _Startups:
    """How long the last workers of a service took from their creation until they were ready."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_STARTUPS))
    counted: set[str] = field(default_factory=set)  # uids of live pods

    def learn(self, pods: tuple[WorkerPod, ...]) -> None:
        """Count each pod that became ready since the last look."""
        for pod in pods:
            if pod.ready and pod.ready_since is not None and pod.uid not in self.counted:
                self.counted.add(pod.uid)
                self.seconds.append((pod.ready_since - pod.created).total_seconds())
        self.counted &= {pod.uid for pod in pods}

    @property
    def p90(self) -> float:
        """The 90th percentile; 0 before any worker was ready."""
        ordered = sorted(self.seconds)
        return ordered[int(0.9 * (len(ordered) - 1))] if ordered else 0.0


@dataclass
class _Past:
    """What is remembered about one service."""

    collector: Collector
    reading: Reading | None = None
    startups: _Startups = field(default_factory=_Startups)
    memory: ScalingMemory = field(default_factory=ScalingMemory)


class ScalingObserver:
    """Measures services and reads their policies, each no more often than scaling needs."""

    def __init__(
        self,
        cluster: Cluster,
        workers: WorkerClient,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._workers = workers
        self._clock = clock
        self._pasts: dict[str, _Past] = {}

    async def observe(self, observed: Observed) -> Scaling:
        """The facts about scaling; `observed` has all the other facts of this pass.

        Missing measurements and an unusable policy are facts too. Raises ClusterError when the API
        server can't be asked for the policy.
        """
        spec = observed.spec
        if spec is None or observed.deleting_since is not None:
            left = None
            if observed.deleting_since is not None:
                left = await self.left_policy(observed.namespace, observed.uid)
            past = self._pasts.pop(observed.uid, None)
            return Scaling(left_policy=left, memory=past.memory if past else ScalingMemory())
        past = self._pasts.get(observed.uid)
        if past is None:
            past = _Past(Collector(self._workers, self._clock))
            self._pasts[observed.uid] = past
        past.startups.learn(observed.pods)
        named = spec.autoscaling.policy_name if spec.autoscaling is not None else None
        left = await self._left_policy(observed.namespace, past.memory, named)
        policy = None
        at = self._clock()
        if _is_due(past, spec.autoscaling, at):
            if spec.autoscaling is not None:
                policy = await self._policy(observed.namespace, spec.autoscaling)
            past.reading = Reading(await _measure(past.collector, observed, spec, policy), at)
        return Scaling(past.reading, policy, left, past.startups.p90, past.memory)

    async def left_policy(self, namespace: str, uid: str) -> PolicyView | None:
        """The policy whose status lists a service that is being deleted, or is gone."""
        past = self._pasts.get(uid)
        return await self._left_policy(namespace, past.memory, None) if past is not None else None

    def remember(self, uid: str, memory: ScalingMemory | None) -> None:
        """Keep what a plan hands on to the next pass over a service; None: forget the service."""
        if memory is None:
            self._pasts.pop(uid, None)
        elif uid in self._pasts:
            self._pasts[uid].memory = memory

    async def _policy(self, namespace: str, chosen: Autoscaling) -> PolicyView:
        name = chosen.policy_name
        if name is None:
            problem = "autoscaling has neither policyName nor inline: set one of them"
            return PolicyView(chosen.inline, "" if chosen.inline is not None else problem)
        try:
            found = await self._cluster.get(AUTOSCALING_POLICY, name, namespace)
        except MissingError:
            problem = f"there is no AutoscalingPolicy {name} in {namespace}: create it"
            return PolicyView(None, f"{problem}, or change autoscaling.policyName", name)
        return read_policy(found)

    async def _left_policy(
        self, namespace: str, memory: ScalingMemory, named: str | None
    ) -> PolicyView | None:
        if not memory.policy_name or memory.policy_name == named:
            return None
        try:
            found = await self._cluster.get(AUTOSCALING_POLICY, memory.policy_name, namespace)
        except ClusterError as error:
            log.info("policy can't be read", policy=memory.policy_name, error=str(error))
            return None
        return read_policy(found)


def read_policy(found: JsonObject) -> PolicyView:
    """An AutoscalingPolicy, with the reason when its spec can't be used."""
    meta = found["metadata"]
    name, version, targets = meta["name"], meta["resourceVersion"], _read_targets(found)
    try:
        spec = AutoscalingPolicySpec.model_validate(found.get("spec", {}))
    except ValidationError as error:
        problem = f"AutoscalingPolicy {name} has an invalid spec: correct it: {problems(error)}"
        return PolicyView(None, problem, name, version, targets)
    return PolicyView(spec, "", name, version, targets)


def _read_targets(policy: JsonObject) -> tuple[PolicyTarget, ...]:
    try:
        return AutoscalingPolicyStatus.model_validate(policy.get("status") or {}).targets
    except ValidationError:
        return ()  # another release wrote it


def _is_due(past: _Past, chosen: Autoscaling | None, now: float) -> bool:
    if past.reading is None:
        return True
    if chosen is None:
        return now - past.reading.at >= MEASURE_SECONDS
    return past.memory.decision is None or now - past.reading.at >= TICK_SECONDS


async def _measure(
    collector: Collector, observed: Observed, spec: InferenceServiceSpec, policy: PolicyView | None
) -> Signals:
    default = spec.slo.default_class
    chosen = policy.spec.objectives.percentile if policy and policy.spec else None
    # Without a policy only status.slo is filled, for which the routers are enough.
    asked = observed.pods if policy is not None else ()
    workers = Pair.build(
        lambda role: [
            PodAddress(pod.uid, pod.ip, pod.ports.http)
            for pod in asked
            if pod.role is role and pod.ready and pod.live and pod.ip
        ]
    )
    latency = Latency(chosen or default.percentile, default.name)
    classes = [Latency(item.percentile, item.name) for item in spec.slo.classes]
    return await collector.read(observed.router_pods, workers, latency, classes)
