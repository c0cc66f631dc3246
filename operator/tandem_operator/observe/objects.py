"""Reads API objects other than pods: the service, its pools, its routers' Deployment, nodes."""

import json
from dataclasses import replace

from pydantic import ValidationError

from tandem_operator.api.inference_service import InferenceServiceSpec
from tandem_operator.api.quantity import parse_quantity
from tandem_operator.api.status import InferenceServiceStatus
from tandem_operator.clients.cluster import JsonObject
from tandem_operator.facts.observed import DeviceView, NodeView, PoolView, RouterView
from tandem_operator.facts.worker import WorkerPod
from tandem_operator.names.annotations import (
    ANNOTATION_IGNORED_SCALE,
    ANNOTATION_MODEL,
    ANNOTATION_SPEC_REPLICAS,
    GKE_NETWORK_STATUS,
)
from tandem_operator.names.labels import LABEL_MANAGED_BY, LABEL_REVISION
from tandem_operator.names.objects import OPERATOR, pool_name
from tandem_operator.observe.pod import read_pod
from tandem_operator.pair import Pair, Role


def read_router(deployment: JsonObject) -> RouterView:
    """The state of the routers. They are rolled out when no pod of an older template is left."""
    meta, spec = deployment["metadata"], deployment.get("spec", {})
    status = deployment.get("status") or {}
    wanted = int(spec.get("replicas", 1))
    replicas = int(status.get("replicas", 0))
    rolled_out = (
        int(status.get("observedGeneration", 0)) >= int(meta.get("generation", 0))
        and int(status.get("updatedReplicas", 0)) == wanted == replicas
        and int(status.get("availableReplicas", 0)) >= wanted
        and int(status.get("terminatingReplicas") or 0) == 0
    )
    message = next(
        (
            item.get("message", "")
            for item in status.get("conditions", [])
            if item.get("type") in ("ReplicaFailure", "Progressing")
            and (item.get("type") == "ReplicaFailure") == (item.get("status") == "True")
        ),
        "",
    )
    return RouterView(
        revision=meta.get("labels", {}).get(LABEL_REVISION, ""),
        model_id=(meta.get("annotations") or {}).get(ANNOTATION_MODEL, ""),
        replicas=replicas,
        ready=int(status.get("readyReplicas", 0)),
        rolled_out=rolled_out,
        message=message,
        wanted=wanted,
        held=_set_only_by_operator(meta.get("managedFields") or []),
        resource_version=meta.get("resourceVersion", ""),
    )


def _set_only_by_operator(entries: list[JsonObject]) -> bool:
    """Whether the operator's own applies, and nobody else, have set spec.replicas."""
    owners = [
        (entry.get("manager"), entry.get("operation"))
        for entry in entries
        if "f:replicas" in entry.get("fieldsV1", {}).get("f:spec", {})
    ]
    return owners == [(OPERATOR, "Apply")]


def read_spec(raw: JsonObject) -> tuple[InferenceServiceSpec | None, str]:
    """The spec, or None and why it can't be read."""
    try:
        return InferenceServiceSpec.model_validate(raw.get("spec", {})), ""
    except ValidationError as error:
        return None, problems(error)


def problems(error: ValidationError) -> str:
    """What is wrong with a spec: the field and the reason, five at most."""
    return "; ".join(
        f"spec.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5]
    )


def read_status(raw: JsonObject) -> InferenceServiceStatus:
    """The last status, or an empty one if there is no status or another release wrote it."""
    try:
        return InferenceServiceStatus.model_validate(raw.get("status") or {})
    except ValidationError:
        return InferenceServiceStatus()


def read_pools(service: str, uid: str, pools: list[JsonObject]) -> Pair[PoolView | None]:
    """The service's own pools; None for one that doesn't exist or belongs to someone else."""
    mine = {
        pool["metadata"]["name"]: pool
        for pool in pools
        if uid in {owner["uid"] for owner in pool["metadata"].get("ownerReferences", [])}
    }

    def view(role: Role) -> PoolView | None:
        found = mine.get(pool_name(service, role))
        return _read_pool(found) if found is not None else None

    return Pair.build(view)


def _read_pool(pool: JsonObject) -> PoolView:
    meta, spec, status = pool["metadata"], pool.get("spec", {}), pool.get("status") or {}
    notes = meta.get("annotations") or {}
    carried = notes.get(ANNOTATION_SPEC_REPLICAS)
    return PoolView(
        name=meta["name"],
        uid=meta["uid"],
        replicas=int(spec.get("replicas", 1)),
        spec_replicas=int(carried) if carried is not None else None,
        desired=status.get("desiredReplicas"),
        ignored_scale=notes.get(ANNOTATION_IGNORED_SCALE, ""),
        revision=spec.get("revision", ""),
        resource_version=meta.get("resourceVersion", ""),
        deleting=bool(meta.get("deletionTimestamp")),
        status=status,
    )


def read_workers(pods: list[JsonObject], pools: Pair[PoolView | None]) -> tuple[WorkerPod, ...]:
    """The worker pods that the service's pools own or have to own again, oldest first.

    A worker without any owner was left by a pool that was deleted with --cascade=orphan. Other
    pods are ignored.
    """
    mine = []
    uids = {pool.uid for pool in pools if pool is not None}
    for pod in pods:
        worker = read_pod(pod)
        if worker is None or pools.of(worker.role) is None:
            continue
        meta = pod["metadata"]
        owners = {owner["uid"] for owner in meta.get("ownerReferences") or []}
        if owners & uids:
            mine.append(worker)
        elif not owners and meta["labels"].get(LABEL_MANAGED_BY) == OPERATOR:
            mine.append(replace(worker, orphan=True))
    return tuple(sorted(mine, key=lambda pod: (pod.created, pod.name)))


def read_record(record: JsonObject, pools: Pair[PoolView | None]) -> Pair[WorkerPod | None]:
    """The workers of a revision that has served, as new ones are to be made; without names."""

    def read(role: Role) -> WorkerPod | None:
        pod, pool = (record.get("data") or {}).get(str(role)), pools.of(role)
        if pod is None or pool is None:
            return None
        # The pool may be another one than when the revision was recorded.
        owners = [{**owner, "uid": pool.uid} for owner in pod["metadata"]["ownerReferences"]]
        uid = record["metadata"]["uid"]
        made = {**pod, "metadata": {**pod["metadata"], "uid": uid, "ownerReferences": owners}}
        worker = read_pod(made)
        return replace(worker, served=True) if worker is not None else None

    return Pair.build(read)


def read_node(node: JsonObject) -> NodeView:
    """A node's extended resources, and whether pods can go there."""
    status, spec = node.get("status", {}), node.get("spec", {})
    ready = any(
        item.get("type") == "Ready" and item.get("status") == "True"
        for item in status.get("conditions", [])
    )
    resources = {
        name: int(parse_quantity(str(amount)))
        for name, amount in (status.get("allocatable") or {}).items()
        if "/" in name
    }
    schedulable = ready and not spec.get("unschedulable")
    return NodeView(node["metadata"]["name"], schedulable, resources, _read_networks(node))


def _read_networks(node: JsonObject) -> tuple[str, ...]:
    """The networks in GKE's annotation; none if it is missing or isn't what it should be."""
    text = (node["metadata"].get("annotations") or {}).get(GKE_NETWORK_STATUS, "[]")
    try:
        return tuple(str(item["name"]) for item in json.loads(text))
    except (ValueError, TypeError, LookupError):
        return ()


def read_devices(slice_: JsonObject) -> tuple[DeviceView, ...]:
    """The devices of a ResourceSlice. Attributes without a domain are the driver's own."""
    spec = slice_.get("spec", {})
    driver = spec.get("driver", "")
    return tuple(
        DeviceView(
            node=spec.get("nodeName", ""),
            driver=driver,
            name=device.get("name", ""),
            attributes={
                name if "/" in name else f"{driver}/{name}": value
                for name, typed in (device.get("attributes") or {}).items()
                for value in typed.values()
                if isinstance(value, str | int | bool)
            },
        )
        for device in spec.get("devices") or ()
    )
