"""The status of an AutoscalingPolicy: what it does for each service that names it."""

from datetime import UTC, datetime
from typing import Any

import structlog

from tandem_operator.api import AutoscalingPolicyStatus
from tandem_operator.api.autoscaling_policy import PolicyTarget
from tandem_operator.api.conditions import ConditionType
from tandem_operator.api.status import ScalingStep
from tandem_operator.clients.cluster import Cluster
from tandem_operator.errors import ClusterError
from tandem_operator.facts.observed import Observed, PolicyDecision
from tandem_operator.plan.scale.telling import SCALING_CONDITIONS
from tandem_operator.plan.status.conditions import Judgement, write_some_conditions

MAX_TARGETS = 256
MAX_SENTENCE = 1024

log = structlog.get_logger("tandem.policy_status")


class PolicyStatusWriter:
    """Writes a service's entry when it changed. Services that share a policy write in turn: each
    write names the version it read, and a lost one is repeated at the next tick."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def tell(self, policy: dict[str, Any], decision: PolicyDecision, at: Observed) -> None:
        """The entry of one service after a tick; `policy` is the object as it was read."""
        old = _targets(policy)
        mine = next((target for target in old if target.name == at.name), None)
        newest = next(iter((*decision.decisions, *at.status.scaling)), None)
        if newest is not None:
            sentence = f"{newest.pool} {newest.from_} to {newest.to}: {newest.because}"
            if newest.how is ScalingStep.ADVISED:
                sentence = f"advised: {sentence}"
        else:
            sentence = f"none yet; {decision.because}"
            if mine is not None and (mine.last_decision or "").startswith("none yet"):
                sentence = mine.last_decision or ""  # measurements change all the time
        conditions = write_some_conditions(
            mine.conditions if mine is not None else (),
            {
                ConditionType(kind): Judgement(*parts)
                for kind, parts in decision.conditions.items()
                if kind in SCALING_CONDITIONS
            },
            at.generation,
            datetime.now(UTC).replace(microsecond=0),
        )
        fresh = PolicyTarget(
            name=at.name, last_decision=sentence[:MAX_SENTENCE], conditions=conditions
        )
        if mine is not None and _gist(mine) == _gist(fresh):
            return
        others = [target for target in old if target.name != at.name]
        await self._write(policy, [*others, fresh])

    async def leave(self, name: str, service: Observed) -> None:
        """Take a service's entry out of the policy that it doesn't name any more."""
        try:
            policy = await self._cluster.get("AutoscalingPolicy", name, service.namespace)
        except ClusterError as error:
            log.info("policy can't be read", policy=name, error=str(error))
            return
        old = _targets(policy)
        kept = [target for target in old if target.name != service.name]
        if len(kept) < len(old):
            await self._write(policy, kept)

    async def _write(self, policy: dict[str, Any], targets: list[PolicyTarget]) -> None:
        meta = policy["metadata"]
        body = {
            "metadata": {"resourceVersion": meta["resourceVersion"]},
            "status": {"targets": [target.to_manifest() for target in targets[-MAX_TARGETS:]]},
        }
        try:
            await self._cluster.merge(
                "AutoscalingPolicy", meta["name"], meta["namespace"], body, subresource="status"
            )
        except ClusterError as error:
            log.info("policy status was not written", policy=meta["name"], error=str(error))


def _targets(policy: dict[str, Any]) -> tuple[PolicyTarget, ...]:
    try:
        return AutoscalingPolicyStatus.model_validate(policy.get("status") or {}).targets
    except ValueError:
        return ()  # another release wrote it


def _gist(target: PolicyTarget) -> tuple[str | None, list[tuple[str, str, str]]]:
    # Messages hold measurements, which change all the time: they are in the service's own status.
    judged = [(item.type, str(item.status), item.reason) for item in target.conditions]
    return target.last_decision, judged
