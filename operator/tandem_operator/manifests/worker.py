"""The pod of one worker."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.kv_transfer import TransferBackend
from tandem_operator.api.pool import Pool
from tandem_operator.api.quantity import parse_quantity
from tandem_operator.facts.observed import Observed, PoolView
from tandem_operator.facts.worker import WorkerPod, WorkerPorts
from tandem_operator.manifests.claims import template_name
from tandem_operator.manifests.container import (
    CHECK_DEFAULTS,
    ENGINE_DEFAULTS,
    build_resources,
    container_security,
    writable_mounts,
    writable_volumes,
)
from tandem_operator.manifests.fault_injection import permit_faults
from tandem_operator.manifests.host_network import move_worker, port_annotations
from tandem_operator.manifests.placement import build_affinity
from tandem_operator.manifests.pod_template import merge_template
from tandem_operator.manifests.revision import model_id_of
from tandem_operator.manifests.storage import WORKER_CACHES, ModelStorage, build_storage, cache_env
from tandem_operator.manifests.wiring import CLAIM, PodWiring, Wiring, build_wiring
from tandem_operator.names import worker as flags
from tandem_operator.names.annotations import (
    ANNOTATION_DRAINING,
    ANNOTATION_MODEL,
    ANNOTATION_MOVING,
    ANNOTATION_RESTARTS,
    ANNOTATION_SERVED,
)
from tandem_operator.names.labels import LABEL_GROUP, LABEL_WORKER, worker_labels
from tandem_operator.names.objects import API_VERSION, WORKER_POOL, worker_name
from tandem_operator.names.pods import (
    ADMIN_TOKEN_ENTRY,
    ADMIN_TOKEN_FOLDER,
    ENGINE_CONTAINER,
    ENV_POD_IP,
    ENV_POD_NAME,
    ENV_SHM_DIR,
    MEMLOCK_CONTAINER,
    PORT_NAME_BOOTSTRAP,
    PORT_NAME_HTTP,
    PORT_NAME_WIRE,
    PORT_WORKER_HTTP,
    PORT_WORKER_WIRE,
    VOLUME_ADMIN_TOKEN,
)
from tandem_operator.names.worker import ROUTE_HEALTH, ROUTE_READY
from tandem_operator.pair import Role

GRACE_AFTER_DRAIN_SECONDS: Final = 30
# A model may take long to download and load: an hour until the kubelet gives up.
_STARTUP = {"periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 3600}
_READINESS = {"periodSeconds": 2, "timeoutSeconds": 5, "failureThreshold": 3}
_LIVENESS = {"periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 6}
_KEPT_METADATA: Final = ("namespace", "labels", "annotations", "ownerReferences")
# Fields of a pod's spec that the API server, admission or the scheduler filled in.
_FILLED_IN: Final = ("nodeName", "priority", "preemptionPolicy", "overhead", "ephemeralContainers")
USER_ID: Final = 65532
"""The user that the images run as."""
CLAIM_SECURITY: Final = {"fsGroup": USER_ID, "fsGroupChangePolicy": "OnRootMismatch"}
"""Lets that user write to a claim. The default policy, Always, would walk over every file of a
model cache at every start of a pod."""


@dataclass(frozen=True)
class Blueprint:
    """What distinguishes one worker from the others of its service.

    `restarts` is how many workers in a row failed in its place. `taken_ports` are those of other
    workers, for one on its node's network.
    """

    role: Role
    name: str
    revision: str
    wiring: Wiring
    restarts: int = 0
    taken_ports: frozenset[int] = frozenset()

    @property
    def group(self) -> str:
        """The worker's id: the last part of its name."""
        return self.name.rsplit("-", 1)[-1]


def build_worker_pod(
    observed: Observed, spec: InferenceServiceSpec, worker: Blueprint
) -> dict[str, Any]:
    """The pod of one worker, owned by the WorkerPool of its role, which must exist.

    restartPolicy is Never: replacing a worker, its evidence and its back-off are the operator's.
    There is no preStop hook, because SIGTERM makes the worker drain.
    """
    pool = observed.pools.of(worker.role)
    assert pool is not None, "a worker is made only for a pool that exists"
    labels = worker_labels(observed.name, worker.role, worker.revision, worker.group)
    parts = build_wiring(worker.wiring, spec.rdma, spec.pool(worker.role).gpus_per_pod)
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": worker.name,
            "namespace": observed.namespace,
            "labels": labels | {LABEL_WORKER: "true"},
            "annotations": {
                **port_annotations(WorkerPorts(bootstrap=spec.kv_transfer.bootstrap_port)),
                ANNOTATION_RESTARTS: str(worker.restarts),
                ANNOTATION_MODEL: model_id_of(spec),
                **parts.annotations,
            },
            "ownerReferences": [build_pool_owner(pool)],
        },
        "spec": _pod_spec(observed, spec, worker, parts),
    }
    merged = merge_template(pod, spec.pool(worker.role).pod_template)
    permit_faults(merged)
    return move_worker(merged, worker.taken_ports)


def build_pool_owner(pool: PoolView) -> dict[str, Any]:
    """The owner reference by which workers are deleted with their pool."""
    return {
        "apiVersion": API_VERSION,
        "kind": WORKER_POOL,
        "name": pool.name,
        "uid": pool.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def build_worker_like(
    observed: Observed,
    worker: WorkerPod,
    name: str,
    restarts: int,
    taken_ports: frozenset[int] = frozenset(),
) -> dict[str, Any]:
    """A pod that runs what `worker` runs, for a revision that the spec no longer describes.

    It has another name, the admin token that this operator knows, and on its node's network ports
    of its own.
    """
    pod = deepcopy(dict(worker.manifest))
    metadata = {key: pod["metadata"][key] for key in _KEPT_METADATA if key in pod["metadata"]}
    annotations = dict(metadata.get("annotations") or {})
    for marked in (ANNOTATION_DRAINING, ANNOTATION_MOVING):
        annotations.pop(marked, None)
    annotations[ANNOTATION_RESTARTS] = str(restarts)
    if worker.served:
        annotations[ANNOTATION_SERVED] = "true"
    pool = observed.pools.of(worker.role)
    assert pool is not None, "a worker is made only for a pool that exists"
    # That of the other worker may be gone, if it was an orphan.
    metadata["ownerReferences"] = [build_pool_owner(pool)]
    labels = {**metadata["labels"], LABEL_GROUP: name.rsplit("-", 1)[-1]}
    spec = {key: value for key, value in pod["spec"].items() if key not in _FILLED_IN}
    for volume in spec.get("volumes") or []:
        if volume["name"] == VOLUME_ADMIN_TOKEN:
            volume["secret"]["secretName"] = observed.admin.secret_name
    copy = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**metadata, "name": name, "labels": labels, "annotations": annotations},
        "spec": spec,
    }
    return move_worker(copy, taken_ports)


def _pod_spec(
    observed: Observed, spec: InferenceServiceSpec, worker: Blueprint, parts: PodWiring
) -> dict[str, Any]:
    pool = spec.pool(worker.role)
    storage = build_storage(spec.model)
    image = spec.engine.image or observed.images.engine
    # A service's own image is pulled as Kubernetes chooses, or as its podTemplate says.
    pulled = {} if spec.engine.image else pull_policy(observed.images.engine_pull_policy)
    volumes, mounts, shm_env = _shared_memory(spec, parts)
    container = {
        "name": ENGINE_CONTAINER,
        "image": image,
        **pulled,
        "args": worker_args(observed.name, spec, worker, storage),
        "ports": [
            {"name": PORT_NAME_HTTP, "containerPort": PORT_WORKER_HTTP},
            {"name": PORT_NAME_WIRE, "containerPort": PORT_WORKER_WIRE},
            {"name": PORT_NAME_BOOTSTRAP, "containerPort": spec.kv_transfer.bootstrap_port},
        ],
        "env": _env(spec, storage, {**parts.env, **shm_env}),
        "resources": _resources(pool, parts),
        "volumeMounts": [
            *mounts,
            *storage.mounts,
            {"name": VOLUME_ADMIN_TOKEN, "mountPath": ADMIN_TOKEN_FOLDER, "readOnly": True},
            *writable_mounts(),
        ],
        "startupProbe": _probe(ROUTE_HEALTH, _STARTUP),
        "readinessProbe": _probe(ROUTE_READY, _READINESS),
        "livenessProbe": _probe(ROUTE_HEALTH, _LIVENESS),
        "securityContext": container_security(parts.capabilities),
    }
    pod_spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "serviceAccountName": worker_name(observed.name),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.rollout.drain_seconds + GRACE_AFTER_DRAIN_SECONDS,
        "securityContext": _pod_security(parts, storage),
        "containers": [container],
        "volumes": [
            *volumes,
            *storage.volumes,
            {"name": VOLUME_ADMIN_TOKEN, "secret": {"secretName": observed.admin.secret_name}},
            *writable_volumes(),
        ],
    }
    if spec.image_pull_secrets:
        pod_spec["imagePullSecrets"] = [item.to_manifest() for item in spec.image_pull_secrets]
    if parts.check_memlock:
        pod_spec["initContainers"] = [{**_memlock_check(image), **pulled}]
    affinity = build_affinity(observed.name, spec, worker.role, worker.wiring)
    if affinity:
        pod_spec["affinity"] = affinity
    if parts.claims:
        name = template_name(observed.name, worker.role, worker.wiring, pool.gpus_per_pod)
        pod_spec["resourceClaims"] = [{"name": CLAIM, "resourceClaimTemplateName": name}]
    return pod_spec


def pull_policy(policy: str) -> dict[str, str]:
    """The field of a container; none leaves the choice to Kubernetes."""
    return {"imagePullPolicy": policy} if policy else {}


def _probe(path: str, times: dict[str, int]) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": PORT_NAME_HTTP}, **times}


def worker_args(
    service: str, spec: InferenceServiceSpec, worker: Blueprint, storage: ModelStorage
) -> list[str]:
    """The flags of `tandem-worker`."""
    pool, model, transfer = spec.pool(worker.role), spec.model, spec.kv_transfer
    values: dict[str, str | int] = {
        flags.FLAG_MODEL: storage.uri,
        flags.FLAG_SERVED_MODEL_NAME: model.name or service,
        flags.FLAG_REVISION: worker.revision,
        flags.FLAG_ROLE: str(worker.role),
        flags.FLAG_HTTP_PORT: PORT_WORKER_HTTP,
        flags.FLAG_WIRE_PORT: PORT_WORKER_WIRE,
        flags.FLAG_BOOTSTRAP_PORT: transfer.bootstrap_port,
        flags.FLAG_PAGE_SIZE: spec.engine.page_size,
        flags.FLAG_MAX_BATCHED_TOKENS: pool.max_batched_tokens,
        flags.FLAG_MAX_RUNNING: pool.max_running,
        flags.FLAG_GPU_MEMORY_PERCENT: pool.gpu_memory_percent,
        flags.FLAG_DTYPE: str(model.dtype),
        flags.FLAG_FORMAT: str(model.format),
        flags.FLAG_DEVICE: "cuda" if pool.gpus_per_pod else "auto",
        flags.FLAG_TRANSFER: str(transfer.backend),
        flags.FLAG_CHUNK_TOKENS: transfer.chunk_tokens,
        flags.FLAG_LOCAL_PREFILL_TOKENS: transfer.local_prefill_tokens,
        flags.FLAG_LEASE_SECONDS: transfer.lease_seconds,
        flags.FLAG_DRAIN_SECONDS: spec.rollout.drain_seconds,
        flags.FLAG_ADMIN_TOKEN_FILE: f"{ADMIN_TOKEN_FOLDER}/{ADMIN_TOKEN_ENTRY}",
        flags.FLAG_CACHE_DIR: storage.cache_dir,
    }
    if pool.tensor_parallel > 1:
        values[flags.FLAG_TENSOR_PARALLEL] = pool.tensor_parallel
    if model.max_model_len is not None:
        values[flags.FLAG_MAX_MODEL_LEN] = model.max_model_len
    options = spec.engine.options
    if options.kv_memory is not None:
        # In bytes, because the worker knows fewer spellings of a quantity than Kubernetes does.
        values[flags.FLAG_KV_MEMORY] = int(parse_quantity(options.kv_memory))
    if options.max_waiting is not None:
        values[flags.FLAG_MAX_WAITING] = options.max_waiting
    args = [item for key, value in values.items() for item in (f"--{key}", str(value))]
    args.append(f"--{flags.FLAG_CHECKSUM if transfer.checksum else flags.FLAG_NO_CHECKSUM}")
    return args


def _env(
    spec: InferenceServiceSpec, storage: ModelStorage, extra: dict[str, str]
) -> list[dict[str, Any]]:
    env: list[dict[str, Any]] = [
        _downward(ENV_POD_NAME, "metadata.name"),
        _downward(ENV_POD_IP, "status.podIP"),
    ]
    plain = {**extra, **cache_env(WORKER_CACHES)}
    if spec.engine.options.num_threads is not None:
        plain["OMP_NUM_THREADS"] = str(spec.engine.options.num_threads)
    env.extend({"name": key, "value": value} for key, value in plain.items())
    env.extend(storage.env)
    chosen = {item.name: item.to_manifest() for item in spec.engine.env}
    return [item for item in env if item["name"] not in chosen] + list(chosen.values())


def _downward(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _resources(pool: Pool, parts: PodWiring) -> dict[str, Any]:
    resources = build_resources(ENGINE_DEFAULTS, pool.resources)
    for kind in ("requests", "limits"):
        if amounts := resources.get(kind):
            kept = {name: each for name, each in amounts.items() if name not in parts.left_out}
            resources[kind] = kept
    if parts.claims:
        resources["claims"] = [*resources.get("claims", []), {"name": CLAIM}]
    if parts.resources:
        limits = dict(resources.get("limits", {}))
        for name, count in parts.resources.items():
            limits.setdefault(name, count)
        resources["limits"] = limits
    return resources


def _shared_memory(
    spec: InferenceServiceSpec, parts: PodWiring
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    volumes, mounts = list(parts.volumes), list(parts.mounts)
    if spec.kv_transfer.backend is not TransferBackend.SHM:
        return volumes, mounts, {}
    # Workers of one node meet in the node's own /dev/shm, which any user may write.
    node_shm = {"name": "shm", "hostPath": {"path": "/dev/shm", "type": "Directory"}}
    volumes = [node_shm if volume["name"] == "shm" else volume for volume in volumes]
    return volumes, mounts, {ENV_SHM_DIR: "/dev/shm"}


def _pod_security(parts: PodWiring, storage: ModelStorage) -> dict[str, Any]:
    security: dict[str, Any] = {"seccompProfile": {"type": "RuntimeDefault"}}
    if parts.restricted:
        # By number: the kubelet can't tell from a name in the image that it isn't root.
        security |= {"runAsNonRoot": True, "runAsUser": USER_ID, "runAsGroup": USER_ID}
    else:
        # Added capabilities reach only root: Kubernetes has no ambient capabilities.
        security["runAsUser"] = 0
    if storage.writes_claim:
        security |= CLAIM_SECURITY
    return security


def _memlock_check(image: str) -> dict[str, Any]:
    """Reports the memlock limit, which only the container runtime can raise, before RDMA fails."""
    return {
        "name": MEMLOCK_CONTAINER,
        "image": image,
        "command": ["sh", "-c", "ulimit -l > /dev/termination-log"],
        "resources": build_resources(CHECK_DEFAULTS),
        "securityContext": container_security(),
    }
