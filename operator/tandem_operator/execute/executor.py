"""Carries a plan out. Every step is tried, and the status is written even if one failed."""

import asyncio
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any, Final

import structlog

from tandem_operator.clients.children import Children
from tandem_operator.clients.cluster import Cluster, JsonObject
from tandem_operator.clients.workers import WorkerClient
from tandem_operator.errors import (
    ClusterError,
    ConflictError,
    MissingError,
    NamespaceEndsError,
    NotOwnedError,
    RefusedFieldError,
)
from tandem_operator.execute.child_writer import ChildWriter, explain
from tandem_operator.execute.events import Events
from tandem_operator.facts.observed import Observed
from tandem_operator.facts.worker import ProbeResult
from tandem_operator.names.objects import (
    AUTOSCALING_POLICY,
    FORMER_FINALIZER,
    INFERENCE_SERVICE,
    SCALE_HOLDER,
    WORKER_POOL,
)
from tandem_operator.names.worker import ACTION_PROBE
from tandem_operator.plan import Deletion, EngineCall, Note, Plan, PodMark
from tandem_operator.plan.steps import Adoption, PolicyTargets

MAX_PARALLEL: Final = 16

log = structlog.get_logger("tandem.execute")


class Executor:
    """Writes to the API server and calls workers."""

    def __init__(
        self, cluster: Cluster, workers: WorkerClient, events: Events, children: Children
    ) -> None:
        self._cluster = cluster
        self._workers = workers
        self._events = events
        self._writer = ChildWriter(cluster, children)
        self._limit = asyncio.Semaphore(MAX_PARALLEL)

    async def execute(self, plan: Plan, observed: Observed) -> ProbeResult | None:
        """Do everything in the plan. Returns what a probe showed.

        Raises the first error after the status was written, so that the queue repeats the pass; but
        NamespaceEndsError at once.
        """
        errors: list[Exception] = []
        probe: ProbeResult | None = None
        for policy in plan.policy_status:
            await self._policy_status(policy, observed)
        if plan.claim:
            await self._claim(plan.claim, observed)
        if plan.drop_finalizer:
            await self._drop_finalizer(observed)
        await self._children(plan, observed, errors)
        _raise_if_namespace_ends(errors)
        await self._all((self._adopt(pod, observed) for pod in plan.adopt), errors)
        refused: dict[str, str] = {}
        await self._all((self._create(pod, observed, refused) for pod in plan.create), errors)
        _raise_if_namespace_ends(errors)
        await self._all((self._mark(mark, observed) for mark in plan.mark), errors)
        for call in plan.engine_calls:
            if call.action == ACTION_PROBE:
                probe = await self._probe(call)
        calls = [call for call in plan.engine_calls if call.action != ACTION_PROBE]
        await self._all((self._call(call) for call in calls), errors)
        deletions = [item for item in plan.delete if item.replaced_by not in refused]
        await self._all((self._delete(item, observed) for item in deletions), errors)
        await self._try(self._status(plan, observed), errors)
        told = [note for note in plan.events if note.created not in refused]
        told += [Note("CreateRefused", text, warning=True) for text in refused.values()]
        for note in told:
            await self._events.post(note, observed)
        if errors:
            raise errors[0]
        return probe

    async def _children(self, plan: Plan, observed: Observed, errors: list[Exception]) -> None:
        write = self._writer
        given = (write.apply(child, observed, SCALE_HOLDER) for child in plan.hand_over)
        await self._all(given, errors)
        # A role can be granted only once it exists.
        grants = [child for child in plan.apply if child["kind"] == "RoleBinding"]
        others = [child for child in plan.apply if child["kind"] != "RoleBinding"]
        await self._all((write.apply(child, observed) for child in others), errors)
        await self._all((write.apply(child, observed) for child in grants), errors)
        await self._all((write.remove(item, observed) for item in plan.remove), errors)
        again = plan.create_once_again
        await self._all((write.create_once(item, again=again) for item in plan.create_once), errors)

    async def _all(self, steps: Any, errors: list[Exception]) -> None:
        async def limited(step: Awaitable[None]) -> None:
            async with self._limit:
                await self._try(step, errors)

        await asyncio.gather(*(limited(step) for step in steps))

    async def _try(self, step: Awaitable[None], errors: list[Exception]) -> None:
        try:
            await step
        except NamespaceEndsError as error:
            errors.append(error)
        except (ClusterError, NotOwnedError, RefusedFieldError) as error:
            log.warning("step failed", error=str(error))
            errors.append(error)

    async def _adopt(self, pod: Adoption, observed: Observed) -> None:
        body = {"metadata": {"uid": pod.uid, "ownerReferences": [dict(pod.owner)]}}
        try:
            # An owner that has gone since, or is going, would take the pod with it.
            pool = await self._cluster.get(WORKER_POOL, pod.owner["name"], observed.namespace)
            if pool["metadata"]["uid"] != pod.owner["uid"] or _is_going(pool):
                log.info("pool is going, its workers are adopted by the next one", pod=pod.name)
                return
            await self._cluster.merge("Pod", pod.name, observed.namespace, body)
        except (MissingError, ConflictError):
            log.info("pod to adopt is gone", pod=pod.name)

    async def _create(self, pod: JsonObject, observed: Observed, refused: dict[str, str]) -> None:
        """Create a pod. If the API server refuses it, `refused` says why, by the pod's name."""
        name = pod["metadata"]["name"]
        try:
            await self._cluster.create(pod)
        except ConflictError:
            # The name is ours by its hash; an earlier pass made it and we looked too early.
            log.info("pod exists already", pod=name)
        except NamespaceEndsError:
            raise
        except ClusterError as error:
            told = explain(error, pod, observed)
            refused[name] = f"worker {name} was not created: {told}"
            raise told from error

    async def _mark(self, mark: PodMark, observed: Observed) -> None:
        body = {"metadata": {"uid": mark.uid, "annotations": dict(mark.annotations)}}
        try:
            await self._cluster.merge("Pod", mark.name, observed.namespace, body)
        except (MissingError, ConflictError):
            log.info("pod to mark is gone", pod=mark.name)

    async def _call(self, call: EngineCall) -> None:
        await self._workers.admin(call.ip, call.port, call.action, call.token, call.body)

    async def _probe(self, call: EngineCall) -> ProbeResult:
        answer = await self._workers.probe(call.ip, call.port, call.token, call.body)
        return ProbeResult(
            revision=call.revision,
            decode=call.pod,
            prefill=call.peer,
            at=datetime.now(UTC),
            transport=answer.transport,
            passed_over=answer.passed_over,
            num_bytes=answer.num_bytes,
            seconds=answer.seconds,
            error=answer.error,
            latency_seconds=answer.latency_seconds,
            prefill_node=call.nodes[0],
            decode_node=call.nodes[1],
        )

    async def _delete(self, item: Deletion, observed: Observed) -> None:
        try:
            await self._cluster.delete(
                "Pod",
                item.name,
                observed.namespace,
                uid=item.uid,
                grace_seconds=item.grace_seconds,
            )
        except ConflictError:
            log.info("pod to delete was replaced", pod=item.name)

    async def _status(self, plan: Plan, observed: Observed) -> None:
        for name, status in plan.pool_status.items():
            seen = next((p.status for p in observed.pools if p is not None and p.name == name), {})
            if status != seen:
                await self._write_status(WORKER_POOL, name, observed.namespace, seen, status)
        if plan.status is None:
            return
        old = observed.status.to_manifest()
        if plan.status != old or not observed.status.conditions:
            await self._write_status(
                INFERENCE_SERVICE, observed.name, observed.namespace, old, plan.status
            )

    async def write_policy_status(self, policy: PolicyTargets, namespace: str) -> None:
        """Write the status of a policy. Raises ConflictError if another service wrote first."""
        body = {
            "metadata": {"resourceVersion": policy.resource_version},
            "status": {"targets": [target.to_manifest() for target in policy.targets]},
        }
        await self._cluster.merge(
            AUTOSCALING_POLICY, policy.name, namespace, body, subresource="status"
        )

    async def _policy_status(self, policy: PolicyTargets, observed: Observed) -> None:
        try:
            await self.write_policy_status(policy, observed.namespace)
        except ClusterError as error:
            # Another service wrote first, or the policy is gone; the next tick makes it good.
            log.info("policy status was not written", policy=policy.name, error=str(error))

    async def _write_status(self, kind: str, name: str, namespace: str, old: Any, new: Any) -> None:
        # A merge patch: what is gone must be said, lists are replaced as a whole.
        gone = {key: None for key in old if key not in new}
        body = {"status": {**gone, **_with_removals(old, new)}}
        try:
            await self._cluster.merge(kind, name, namespace, body, subresource="status")
        except MissingError:
            log.info("object is gone, no status to write", kind=kind, name=name)

    async def _claim(self, operator: str, observed: Observed) -> None:
        """Take a service. Raises ConflictError if it changed since it was read, by a claim say."""
        body = {
            "metadata": {"resourceVersion": observed.resource_version},
            "status": {"operator": operator},
        }
        name, namespace = observed.name, observed.namespace
        await self._cluster.merge(INFERENCE_SERVICE, name, namespace, body, subresource="status")
        log.info("serving", service=name, namespace=namespace, before=observed.ownership.holder)

    async def _drop_finalizer(self, observed: Observed) -> None:
        try:
            service = await self._cluster.get(INFERENCE_SERVICE, observed.name, observed.namespace)
        except MissingError:
            return
        meta = service["metadata"]
        if meta["uid"] != observed.uid:
            return
        kept = [item for item in meta.get("finalizers", []) if item != FORMER_FINALIZER]
        body = {"metadata": {"finalizers": kept, "resourceVersion": meta["resourceVersion"]}}
        await self._cluster.merge(INFERENCE_SERVICE, observed.name, observed.namespace, body)


def _raise_if_namespace_ends(errors: list[Exception]) -> None:
    for error in errors:
        if isinstance(error, NamespaceEndsError):
            raise error


def _is_going(body: JsonObject) -> bool:
    return bool(body["metadata"].get("deletionTimestamp"))


def _with_removals(old: Any, new: Any) -> dict[str, Any]:
    merged = {}
    for key, value in new.items():
        before = old.get(key) if isinstance(old, dict) else None
        if isinstance(value, dict) and isinstance(before, dict):
            gone = {name: None for name in before if name not in value}
            merged[key] = {**gone, **_with_removals(before, value)}
        else:
            merged[key] = value
    return merged
