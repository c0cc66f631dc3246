"""What both pools share: WorkerPools, identity, Service, budgets and network policies."""

from base64 import b64encode
from typing import Any

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.facts.observed import Observed
from tandem_operator.names.annotations import ANNOTATION_IGNORED_SCALE, ANNOTATION_SPEC_REPLICAS
from tandem_operator.names.labels import (
    LABEL_ROLE,
    LABEL_SERVICE,
    LABEL_WORKER,
    ROUTER,
    WORKER,
    common_labels,
)
from tandem_operator.names.objects import (
    API_VERSION,
    INFERENCE_SERVICE,
    WORKER_POOL,
    pool_name,
    router_name,
    worker_name,
)
from tandem_operator.names.pods import (
    ADMIN_TOKEN_ENTRY,
    PORT_NAME_BOOTSTRAP,
    PORT_NAME_HTTP,
    PORT_NAME_WIRE,
    PORT_ROUTER_HTTP,
    PORT_ROUTER_METRICS,
    PORT_WORKER_HTTP,
    PORT_WORKER_WIRE,
)
from tandem_operator.pair import Role


def build_owner(observed: Observed) -> dict[str, Any]:
    """The owner reference by which children are deleted with the service."""
    return {
        "apiVersion": API_VERSION,
        "kind": INFERENCE_SERVICE,
        "name": observed.name,
        "uid": observed.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def build_pool(
    observed: Observed, role: Role, replicas: int, spec_replicas: int, ignored: str, revision: str
) -> dict[str, Any]:
    """The WorkerPool of a role.

    `spec_replicas` is the number in the service's spec, kept in an annotation. `ignored` says why a
    write to the pool's scale has no effect, or is empty.
    """
    annotations = {ANNOTATION_SPEC_REPLICAS: str(spec_replicas)}
    if ignored:
        annotations[ANNOTATION_IGNORED_SCALE] = ignored
    metadata: dict[str, Any] = {
        "name": pool_name(observed.name, role),
        "namespace": observed.namespace,
        "labels": common_labels(observed.name, role),
        "annotations": annotations,
        "ownerReferences": [build_owner(observed)],
    }
    seen = observed.pools.of(role)
    if seen is not None:
        # A write to /scale since we looked must not be overwritten: the API server refuses then.
        metadata["resourceVersion"] = seen.resource_version
    return {
        "apiVersion": API_VERSION,
        "kind": WORKER_POOL,
        "metadata": metadata,
        "spec": {
            "serviceName": observed.name,
            "role": role.title(),
            "replicas": replicas,
            "revision": revision,
        },
    }


def build_admin_secret(observed: Observed) -> dict[str, Any]:
    """The admin token of the service's workers, which only they mount.

    It belongs to their ServiceAccount, whose uid is filled in when it is created: the operator may
    not give a Secret another owner later, and `kubectl delete --cascade=orphan` of the service
    would take one away that is the service itself.
    """
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": observed.admin.secret_name,
            "namespace": observed.namespace,
            "labels": common_labels(observed.name, WORKER),
            "ownerReferences": [
                {"apiVersion": "v1", "kind": "ServiceAccount", "name": worker_name(observed.name)}
            ],
        },
        "type": "Opaque",
        "immutable": True,
        "data": {ADMIN_TOKEN_ENTRY: b64encode(observed.admin.token.encode()).decode()},
    }


def build_fleet(
    observed: Observed, spec: InferenceServiceSpec, owner: dict[str, Any]
) -> list[dict[str, Any]]:
    """Identity, headless Service, budgets and network policies of the workers and routers."""
    meta = {
        "namespace": observed.namespace,
        "labels": common_labels(observed.name, WORKER),
        "ownerReferences": [owner],
    }
    children: list[dict[str, Any]] = [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": worker_name(observed.name), **meta},
            "automountServiceAccountToken": False,
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": worker_name(observed.name), **meta},
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": _selector(observed, WORKER),
                "ports": [
                    {"name": PORT_NAME_HTTP, "port": PORT_WORKER_HTTP, "protocol": "TCP"},
                    {"name": PORT_NAME_WIRE, "port": PORT_WORKER_WIRE, "protocol": "TCP"},
                    {
                        "name": PORT_NAME_BOOTSTRAP,
                        "port": spec.kv_transfer.bootstrap_port,
                        "protocol": "TCP",
                    },
                ],
            },
        },
        *(_budget(observed, owner, pool_name(observed.name, role), role) for role in Role),
        _budget(observed, owner, router_name(observed.name), ROUTER),
    ]
    if spec.network_policy.enabled:
        children.extend(_network_policies(observed, owner))
    return children


def _selector(observed: Observed, component: str) -> dict[str, str]:
    one = {LABEL_WORKER: "true"} if component == WORKER else {LABEL_ROLE: component}
    return {LABEL_SERVICE: observed.name, **one}


def _budget(observed: Observed, owner: dict[str, Any], name: str, component: str) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {
            "name": name,
            "namespace": observed.namespace,
            "labels": common_labels(observed.name, component),
            "ownerReferences": [owner],
        },
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": _selector(observed, component)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }


def _network_policies(observed: Observed, owner: dict[str, Any]) -> list[dict[str, Any]]:
    """Clients reach only routers; routers the wire; workers each other; metrics stay open.

    Ports 8100 and 8001 are open to probes, Prometheus and the operator; /admin/* needs the token.
    The transports between workers choose their own ports, so workers may reach all of each
    other's.
    """
    router = {"podSelector": {"matchLabels": _selector(observed, ROUTER)}}
    worker = {"podSelector": {"matchLabels": _selector(observed, WORKER)}}
    rules: dict[str, tuple[str, list[dict[str, Any]]]] = {
        worker_name(observed.name): (
            WORKER,
            [
                {"from": [router], "ports": [_port(PORT_WORKER_WIRE)]},
                {"from": [worker]},
                {"ports": [_port(PORT_WORKER_HTTP)]},
            ],
        ),
        router_name(observed.name): (
            ROUTER,
            [{"ports": [_port(PORT_ROUTER_HTTP), _port(PORT_ROUTER_METRICS)]}],
        ),
    }
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {
                "name": name,
                "namespace": observed.namespace,
                "labels": common_labels(observed.name, component),
                "ownerReferences": [owner],
            },
            "spec": {
                "podSelector": {"matchLabels": _selector(observed, component)},
                "policyTypes": ["Ingress"],
                "ingress": ingress,
            },
        }
        for name, (component, ingress) in rules.items()
    ]


def _port(number: int) -> dict[str, Any]:
    return {"port": number, "protocol": "TCP"}
