"""Collects the facts about one service from the API server and from its workers."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import structlog

from tandem_operator.api import InferenceServiceSpec, InferenceServiceStatus
from tandem_operator.api.kv_transfer import VerifyMode
from tandem_operator.api.rdma import RdmaMode
from tandem_operator.clients.admin_key import AdminKey
from tandem_operator.clients.children import Children
from tandem_operator.clients.cluster import Cluster, JsonObject
from tandem_operator.clients.workers import WorkerClient
from tandem_operator.errors import ClusterError, MissingError, OperatorError
from tandem_operator.facts.admin import derive_access
from tandem_operator.facts.observed import (
    Claim,
    Claimable,
    Images,
    Observed,
    Ownership,
    PoolView,
    RouterView,
)
from tandem_operator.facts.scaling import PolicyView, ScalingMemory
from tandem_operator.facts.worker import ProbeResult, WorkerPod
from tandem_operator.names.labels import LABEL_SERVICE
from tandem_operator.names.objects import (
    CONTROLLER_REVISION,
    FORMER_FINALIZER,
    INFERENCE_SERVICE,
    WORKER_POOL,
    record_name,
    router_name,
)
from tandem_operator.names.worker import RDMA_TRANSPORTS
from tandem_operator.observe.claims import ClaimReader
from tandem_operator.observe.fabric import FabricObserver
from tandem_operator.observe.links import LinkObserver
from tandem_operator.observe.objects import (
    read_pools,
    read_record,
    read_router,
    read_spec,
    read_status,
    read_workers,
)
from tandem_operator.observe.pod import (
    read_router_pod,
    read_router_trouble,
    read_time,
    waits_for_volumes,
    with_warning,
)
from tandem_operator.observe.scaling import ScalingObserver
from tandem_operator.pair import Pair, Role

LOG_LINES = 30
WAITING_LIMIT = timedelta(seconds=15)
"""A pod that waits for its volumes for this time is asked about."""
_AUTO = (RdmaMode.AUTO,) if RDMA_TRANSPORTS else ()
_NODES_MATTER = (*_AUTO, *set(RdmaMode) - {RdmaMode.AUTO, RdmaMode.NONE, RdmaMode.HOST_PATH})
_CLAIMS_MATTER = (*_AUTO, RdmaMode.DRA)
"""The modes whose wiring depends on nodes, and on what can be claimed."""

log = structlog.get_logger("tandem.observe")


class Observer:
    """Reads facts. Keeps only what scaling has to remember from one pass to the next."""

    def __init__(
        self,
        cluster: Cluster,
        workers: WorkerClient,
        images: Images,
        claims: ClaimReader,
        children: Children,
        admin_key: AdminKey,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._claims = claims
        self._uids: dict[tuple[str, str], str] = {}
        self._workers = workers
        self._images = images
        self._children = children
        self._admin_key = admin_key
        self._scaling = ScalingObserver(cluster, workers, clock)
        self._links = LinkObserver(workers, clock)
        self._fabric = FabricObserver(cluster, clock)

    def remember(self, observed: Observed, memory: ScalingMemory | None) -> None:
        """Keep what the plan for these facts hands on to the next pass; None: nothing."""
        self._scaling.remember(observed.uid, memory)

    async def left_policy(self, namespace: str, name: str) -> PolicyView | None:
        """The policy that still lists a service that is gone."""
        return await self._scaling.left_policy(namespace, self._uids.get((namespace, name), ""))

    def forget(self, namespace: str, name: str) -> None:
        """Forget a service that is gone."""
        uid = self._uids.pop((namespace, name), "")
        self._scaling.remember(uid, None)
        self._links.forget(uid)
        self._claims.forget(uid)

    async def observe(
        self,
        namespace: str,
        name: str,
        probe: ProbeResult | None = None,
        last_error: OperatorError | None = None,
    ) -> Observed:
        """All facts about a service. Raises MissingError when there is no such service.

        `probe` is the last one, `last_error` what went wrong in the last pass.
        """
        raw = await self._cluster.get(INFERENCE_SERVICE, name, namespace)
        uid = raw["metadata"]["uid"]
        if self._uids.get((namespace, name), uid) != uid:
            self.forget(namespace, name)
        self._uids[namespace, name] = uid
        ownership = await self._claims.read(uid, (raw.get("status") or {}).get("operator") or "")
        if ownership.claim is not Claim.MINE:
            return _not_mine(raw, ownership)
        pods, pools, router = await asyncio.gather(
            self._cluster.list("Pod", namespace, f"{LABEL_SERVICE}={name}"),
            self._cluster.list(WORKER_POOL, namespace, f"{LABEL_SERVICE}={name}"),
            self._router(namespace, name),
        )
        pods = await self._with_warnings(namespace, pods)
        meta = raw["metadata"]
        spec, spec_error = read_spec(raw)
        views = read_pools(name, meta["uid"], pools)
        status = read_status(raw)
        admin = derive_access(await self._admin_key.read(), namespace, name)
        workers = tuple(
            replace(pod, admin_token=admin.token if pod.admin_secret == admin.secret_name else "")
            for pod in read_workers(pods, views)
        )
        workers = await self._with_evidence(namespace, workers, status)
        deleting = read_time(meta.get("deletionTimestamp"))
        mode = spec.rdma.mode if spec is not None else None
        changed = status.observed_generation != int(meta.get("generation", 0))
        observed = Observed(
            name=name,
            namespace=namespace,
            uid=meta["uid"],
            generation=int(meta.get("generation", 0)),
            spec=spec,
            spec_error=spec_error,
            status=status,
            deleting_since=deleting,
            has_former_finalizer=FORMER_FINALIZER in meta.get("finalizers", []),
            resource_version=meta.get("resourceVersion", ""),
            ownership=ownership,
            pools=views,
            pods=await self._with_states(await self._with_links(uid, spec, workers), views),
            router=router,
            router_pods=tuple(found for pod in pods if (found := read_router_pod(pod))),
            router_troubles=tuple(told for pod in pods if (told := read_router_trouble(pod))),
            children=self._children.of_service(namespace, name),
            recorded=await self._record(namespace, name, router, workers, views),
            nodes=await self._fabric.nodes(fresh=changed) if mode in _NODES_MATTER else (),
            claimable=(
                await self._fabric.claimable(fresh=changed)
                if mode in _CLAIMS_MATTER
                else Claimable()
            ),
            probe=probe,
            last_error=str(last_error or ""),
            last_reason=last_error.reason if last_error is not None else "",
            images=self._images,
            admin=admin,
        )
        return replace(observed, scaling=await self._scaling.observe(observed))

    async def _record(
        self,
        namespace: str,
        name: str,
        router: RouterView | None,
        workers: tuple[WorkerPod, ...],
        pools: Pair[PoolView | None],
    ) -> Pair[WorkerPod | None]:
        """What the workers of the routed revision are made of, if a role has none left to copy."""
        nothing: Pair[WorkerPod | None] = Pair(None, None)
        routed = router.revision if router is not None else ""
        present = {pod.role for pod in workers if pod.revision == routed}
        known = self._children.content(CONTROLLER_REVISION, namespace, record_name(name, routed))
        if present == set(Role) or not known:
            return nothing
        try:
            record = await self._cluster.get(
                CONTROLLER_REVISION, record_name(name, routed), namespace
            )
        except MissingError:
            return nothing
        return read_record(record, pools)

    async def _router(self, namespace: str, name: str) -> RouterView | None:
        try:
            deployment = await self._cluster.get("Deployment", router_name(name), namespace)
        except MissingError:
            return None
        return read_router(deployment)

    async def _with_warnings(self, namespace: str, pods: list[JsonObject]) -> list[JsonObject]:
        """The pods; where one waits for its volumes, the reason is that of its last warning.

        Kubernetes tells of a volume that can't be mounted in an event and nowhere else.
        """
        late = datetime.now(UTC) - WAITING_LIMIT

        async def add(pod: JsonObject) -> JsonObject:
            created = read_time(pod["metadata"].get("creationTimestamp"))
            if not waits_for_volumes(pod) or created is None or created > late:
                return pod
            name = pod["metadata"]["name"]
            try:
                found = await self._cluster.last_warning(namespace, name)
            except ClusterError as error:
                log.info("events can't be read", pod=name, error=str(error))
                return pod
            return with_warning(pod, found) if found else pod

        return list(await asyncio.gather(*(add(pod) for pod in pods)))

    async def _with_evidence(
        self, namespace: str, pods: tuple[WorkerPod, ...], status: InferenceServiceStatus
    ) -> tuple[WorkerPod, ...]:
        known = {(failure.pod, failure.at) for failure in status.failures}

        async def add_log(pod: WorkerPod) -> WorkerPod:
            failure = pod.failure
            if failure is None or (pod.name, failure.at) in known:
                return pod
            try:
                text = await self._cluster.pod_log(
                    namespace, pod.name, failure.container, LOG_LINES
                )
            except ClusterError as error:
                text = f"(no log: {error.message})"
            return replace(pod, failure=replace(failure, log=text or failure.log))

        return tuple(await asyncio.gather(*(add_log(pod) for pod in pods)))

    async def _with_links(
        self, uid: str, spec: InferenceServiceSpec | None, pods: tuple[WorkerPod, ...]
    ) -> tuple[WorkerPod, ...]:
        verifies = spec is not None and spec.kv_transfer.verify.mode is not VerifyMode.OFF
        return await self._links.add(uid, pods, links=verifies)

    async def _with_states(
        self,
        pods: tuple[WorkerPod, ...],
        pools: Pair[PoolView | None],
    ) -> tuple[WorkerPod, ...]:
        crowded = {
            role
            for role, pool in pools.items()
            if pool is not None
            and sum(pod.role is role and pod.live for pod in pods)
            > min(pool.replicas, pool.replicas if pool.desired is None else pool.desired)
        }

        async def add_state(pod: WorkerPod) -> WorkerPod:
            asked = pod.draining_since is not None or pod.role in crowded
            # One that isn't ready may have been drained behind the operator's back.
            asked = asked or not pod.ready
            if not (asked and pod.started and pod.ip) or pod.deleting:
                return pod
            return replace(pod, state=await self._workers.state(pod.ip, pod.ports.http))

        return tuple(await asyncio.gather(*(add_state(pod) for pod in pods)))


def _not_mine(raw: JsonObject, ownership: Ownership) -> Observed:
    """All that is read of a service that this operator doesn't serve."""
    meta = raw["metadata"]
    return Observed(
        name=meta["name"],
        namespace=meta["namespace"],
        uid=meta["uid"],
        generation=int(meta.get("generation", 0)),
        spec=None,
        resource_version=meta.get("resourceVersion", ""),
        ownership=ownership,
    )
