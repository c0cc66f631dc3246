"""The routers: Deployment, Service, and the identity that lets them watch pods."""

import json
from typing import Any

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.router import FIRST_ROUTERS
from tandem_operator.facts.observed import Observed
from tandem_operator.manifests.container import (
    ROUTER_DEFAULTS,
    build_resources,
    container_security,
    writable_mounts,
    writable_volumes,
)
from tandem_operator.manifests.host_network import move_router
from tandem_operator.manifests.pod_template import merge_template
from tandem_operator.manifests.revision import model_id_of
from tandem_operator.manifests.storage import ROUTER_CACHES, build_storage, cache_env
from tandem_operator.manifests.worker import (
    CLAIM_SECURITY,
    GRACE_AFTER_DRAIN_SECONDS,
    USER_ID,
    pull_policy,
)
from tandem_operator.names import router as flags
from tandem_operator.names.annotations import ANNOTATION_MODEL
from tandem_operator.names.labels import (
    LABEL_REVISION,
    LABEL_ROLE,
    LABEL_SERVICE,
    ROUTER,
    common_labels,
)
from tandem_operator.names.objects import router_name, router_service_name
from tandem_operator.names.pods import (
    ENV_POD_NAME,
    PORT_NAME_HTTP,
    PORT_NAME_METRICS,
    PORT_ROUTER_HTTP,
    PORT_ROUTER_METRICS,
    ROUTER_CONTAINER,
)

API_KEYS_PATH = "/etc/tandem/api-keys"


def build_router(
    observed: Observed, spec: InferenceServiceSpec, revision: str, owner: dict[str, Any]
) -> list[dict[str, Any]]:
    """Everything that the routers need. `revision` is the one that serves."""
    labels = common_labels(observed.name, ROUTER)
    name, namespace = router_name(observed.name), observed.namespace
    meta = {"namespace": namespace, "labels": labels, "ownerReferences": [owner]}
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": name, **meta},
            "automountServiceAccountToken": False,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": {"name": name, **meta},
            "rules": [
                {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": name, **meta},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
        },
        _service(observed, spec, meta),
        _deployment(observed, spec, revision, meta),
    ]


def _service(
    observed: Observed, spec: InferenceServiceSpec, meta: dict[str, Any]
) -> dict[str, Any]:
    service = spec.router.service
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": router_service_name(observed.name), **meta},
        "spec": {
            "type": str(service.type),
            "selector": {LABEL_SERVICE: observed.name, LABEL_ROLE: ROUTER},
            "ports": [
                {
                    "name": PORT_NAME_HTTP,
                    "port": service.port,
                    "targetPort": PORT_NAME_HTTP,
                    "protocol": "TCP",
                    "appProtocol": "http",
                }
            ],
        },
    }


def _deployment(
    observed: Observed, spec: InferenceServiceSpec, revision: str, meta: dict[str, Any]
) -> dict[str, Any]:
    # Only the Deployment has the revision: routers go on while one replaces another.
    labels = {**meta["labels"], LABEL_REVISION: revision}
    template = merge_template(
        {"metadata": {"labels": meta["labels"]}, "spec": _pod_spec(observed, spec)},
        spec.router.pod_template,
    )
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": router_name(observed.name),
            **meta,
            "labels": labels,
            "annotations": {ANNOTATION_MODEL: model_id_of(spec)},
        },
        "spec": {
            **_replicas(observed, spec),
            "selector": {"matchLabels": {LABEL_SERVICE: observed.name, LABEL_ROLE: ROUTER}},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
            },
            "revisionHistoryLimit": spec.revision_history_limit,
            "template": move_router(template, observed.namespace, observed.name),
        },
    }


def _replicas(observed: Observed, spec: InferenceServiceSpec) -> dict[str, int]:
    """The number of routers, as long as it is the operator's: in the spec, or the first one."""
    if spec.router.replicas is not None:
        return {"replicas": spec.router.replicas}
    return {"replicas": FIRST_ROUTERS} if observed.router is None else {}


def build_scale_holder(observed: Observed, spec: InferenceServiceSpec) -> dict[str, Any] | None:
    """The routers' present number, to be applied as SCALE_HOLDER; None when it isn't needed.

    A field that its only manager stops applying goes back to its default, which is one router. So
    before the operator leaves the number to a scaler, another manager has to hold it.
    """
    router = observed.router
    if spec.router.replicas is not None or router is None or not router.held:
        return None
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": router_name(observed.name),
            "namespace": observed.namespace,
            # A scaler that wrote in the meantime wins: the API server refuses this then.
            "resourceVersion": router.resource_version,
        },
        "spec": {"replicas": router.wanted},
    }


def _pod_spec(observed: Observed, spec: InferenceServiceSpec) -> dict[str, Any]:
    storage = build_storage(spec.model, weights=False)
    volumes = [*storage.volumes, *writable_volumes()]
    mounts = [*storage.mounts, *writable_mounts()]
    cache = cache_env(ROUTER_CACHES)
    env = [
        {"name": ENV_POD_NAME, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        *({"name": name, "value": value} for name, value in cache.items()),
        *storage.env,
    ]
    if spec.router.api_keys_secret_name:
        secret = {"secretName": spec.router.api_keys_secret_name}
        volumes.append({"name": "api-keys", "secret": secret})
        mounts.append({"name": "api-keys", "mountPath": API_KEYS_PATH, "readOnly": True})
    container: dict[str, Any] = {
        "name": ROUTER_CONTAINER,
        "image": observed.images.router,
        **pull_policy(observed.images.router_pull_policy),
        "args": router_args(observed, spec, storage.uri),
        "ports": [
            {"name": PORT_NAME_HTTP, "containerPort": PORT_ROUTER_HTTP, "protocol": "TCP"},
            {"name": PORT_NAME_METRICS, "containerPort": PORT_ROUTER_METRICS, "protocol": "TCP"},
        ],
        "env": env,
        "volumeMounts": mounts,
        "resources": build_resources(ROUTER_DEFAULTS, spec.router.resources),
        "startupProbe": _probe(
            flags.ROUTE_HEALTH, periodSeconds=1, timeoutSeconds=5, failureThreshold=600
        ),
        "readinessProbe": _probe(
            flags.ROUTE_READY, periodSeconds=2, timeoutSeconds=5, failureThreshold=3
        ),
        "livenessProbe": _probe(
            flags.ROUTE_HEALTH, periodSeconds=10, timeoutSeconds=10, failureThreshold=6
        ),
        "securityContext": container_security(),
    }
    security: dict[str, Any] = {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if storage.writes_claim:
        security |= CLAIM_SECURITY
    pod: dict[str, Any] = {
        "serviceAccountName": router_name(observed.name),
        "automountServiceAccountToken": True,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.rollout.drain_seconds + GRACE_AFTER_DRAIN_SECONDS,
        "securityContext": security,
        "containers": [container],
        "volumes": volumes,
    }
    if spec.image_pull_secrets:
        pod["imagePullSecrets"] = [item.to_manifest() for item in spec.image_pull_secrets]
    return pod


def router_args(observed: Observed, spec: InferenceServiceSpec, uri: str) -> list[str]:
    """The flags of `tandem-router`."""
    # Routers count what kept its objective; the operator takes percentiles of that.
    classes = [item.to_manifest() for item in spec.slo.classes]
    for item in classes:
        item.pop("percentile", None)
    values: dict[str, str | int] = {
        flags.FLAG_MODEL_NAME: spec.model.name or observed.name,
        flags.FLAG_MODEL: uri,
        flags.FLAG_MODEL_ID: model_id_of(spec),
        flags.FLAG_HOST: "0.0.0.0",
        flags.FLAG_PORT: PORT_ROUTER_HTTP,
        flags.FLAG_METRICS_PORT: PORT_ROUTER_METRICS,
        flags.FLAG_SERVICE: observed.name,
        flags.FLAG_NAMESPACE: observed.namespace,
        flags.FLAG_POLICY: str(spec.router.policy),
        flags.FLAG_SLO_CLASSES: json.dumps(classes, separators=(",", ":")),
        flags.FLAG_DRAIN_SECONDS: spec.rollout.drain_seconds,
    }
    if spec.router.api_keys_secret_name:
        values[flags.FLAG_API_KEYS_FILE] = API_KEYS_PATH
    arguments = [item for key, value in values.items() for item in (f"--{key}", str(value))]
    for origin in spec.router.cors_origins:
        arguments += [f"--{flags.FLAG_CORS_ORIGIN}", origin]
    return arguments


def _probe(path: str, **settings: int) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": PORT_NAME_HTTP}, **settings}
