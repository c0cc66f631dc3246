"""Names that operator, charts and users share: group, labels, annotations, ports, children.

A service's name has at most 40 characters, so that every child's name fits a DNS label (63).
"""

import hashlib
from enum import StrEnum

GROUP = "tandem.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
INFERENCE_SERVICE = "InferenceService"
INFERENCE_SERVICES = "inferenceservices"
WORKER_POOL = "WorkerPool"
WORKER_POOLS = "workerpools"
AUTOSCALING_POLICY = "AutoscalingPolicy"
AUTOSCALING_POLICIES = "autoscalingpolicies"

FIELD_MANAGER = "tandem-operator"
FINALIZER = f"{GROUP}/finalizer"
STORAGE_PREFIX = GROUP
MAX_SERVICE_NAME = 40

LABEL_NAME = "app.kubernetes.io/name"
LABEL_INSTANCE = "app.kubernetes.io/instance"
LABEL_COMPONENT = "app.kubernetes.io/component"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_VERSION = "app.kubernetes.io/version"
LABEL_SERVICE = f"{GROUP}/service"
LABEL_ROLE = f"{GROUP}/role"
LABEL_REVISION = f"{GROUP}/revision"
LABEL_GROUP = f"{GROUP}/group"
MANAGED_BY = "tandem-operator"

ANNOTATION_DRAINING = f"{GROUP}/draining"
ANNOTATION_BOOTSTRAP_PORT = f"{GROUP}/bootstrap-port"
ANNOTATION_COST = f"{GROUP}/cost"
ANNOTATION_IGNORED_SCALE = f"{GROUP}/ignored-scale"

PORT_ROUTER_HTTP = 8000
PORT_WORKER_HTTP = 8100
PORT_WORKER_WIRE = 8101
PORT_WORKER_BOOTSTRAP = 8998
PORT_NAME_HTTP = "http"
PORT_NAME_WIRE = "wire"
PORT_NAME_BOOTSTRAP = "bootstrap"

ENGINE_CONTAINER = "engine"
ROUTER_CONTAINER = "router"
_ID_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
_ID_LENGTH = 8


class RoleLabel(StrEnum):
    """Values of the label `tandem.dev/role`."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"
    ROUTER = "router"


def router_name(service: str) -> str:
    """The router's Deployment, ServiceAccount, Role, RoleBinding, budget and NetworkPolicy."""
    return f"{service}-router"


def router_service_name(service: str) -> str:
    """The Service that clients talk to: the service's own name."""
    return service


def worker_name(service: str) -> str:
    """The workers' ServiceAccount, headless Service and NetworkPolicy, shared by both pools."""
    return f"{service}-worker"


def pool_name(service: str, role: RoleLabel) -> str:
    """The WorkerPool of a role, and its PodDisruptionBudget."""
    return f"{service}-{role}"


def stable_id(*parts: str | int) -> str:
    """Eight characters that depend on nothing but `parts`; without vowels, so never a word."""
    number = int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "big")
    letters = []
    for _ in range(_ID_LENGTH):
        number, index = divmod(number, len(_ID_ALPHABET))
        letters.append(_ID_ALPHABET[index])
    return "".join(letters)


def worker_pod_name(service: str, role: RoleLabel, group: str, rank: int = 0) -> str:
    """The pod of one rank of a worker; `group` is the worker's `stable_id`.

    At most 40 + 1 + 7 + 1 + 8 + 3 = 60 characters. The role is the one that the worker was born
    with: after a warm role change only the label tells the truth.
    """
    name = f"{service}-{role}-{group}"
    return name if rank == 0 else f"{name}-{rank}"


def worker_labels(service: str, role: RoleLabel, revision: str, group: str) -> dict[str, str]:
    """The labels on every worker pod."""
    return common_labels(service, role) | {LABEL_REVISION: revision, LABEL_GROUP: group}


def common_labels(service: str, component: str) -> dict[str, str]:
    """The labels on every child; `component` is the role, or `worker` for what both pools share."""
    labels = {
        LABEL_NAME: "tandem",
        LABEL_INSTANCE: service,
        LABEL_COMPONENT: str(component),
        LABEL_MANAGED_BY: MANAGED_BY,
        LABEL_SERVICE: service,
    }
    if component in set(RoleLabel):
        labels[LABEL_ROLE] = str(component)
    return labels


def selector(service: str, role: RoleLabel) -> str:
    """The label selector of a pool's pods."""
    return f"{LABEL_SERVICE}={service},{LABEL_ROLE}={role}"
