"""Names of our kinds, of the operator, and of a service's children.

A service's name has at most 40 characters, so that every child's name fits a DNS label (63).
"""

import hashlib
from typing import Final

from tandem_operator.pair import Role

GROUP: Final = "tandem.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
INFERENCE_SERVICE: Final = "InferenceService"
INFERENCE_SERVICES: Final = "inferenceservices"
WORKER_POOL: Final = "WorkerPool"
WORKER_POOLS: Final = "workerpools"
AUTOSCALING_POLICY: Final = "AutoscalingPolicy"
AUTOSCALING_POLICIES: Final = "autoscalingpolicies"
CONTROLLER_REVISION: Final = "ControllerRevision"
CLAIM_TEMPLATE: Final = "ResourceClaimTemplate"

OPERATOR: Final = "tandem-operator"
"""The field manager of everything that the operator writes, and its default lease."""
FORMER_FINALIZER: Final = f"{GROUP}/finalizer"
"""Earlier versions put it on services; the operator takes it off, and never adds one (adr/0013)."""
SCALE_HOLDER: Final = f"{OPERATOR}-scale"
"""The field manager that keeps the routers' number when the operator leaves it to others."""
KOPF_FINALIZER: Final = f"{GROUP}/kopf"
"""kopf's own, which is never added: kopf puts it only on objects that need a handler."""
REPORTING_CONTROLLER: Final = f"{GROUP}/operator"
"""Who reports the operator's events."""
STORAGE_PREFIX: Final = GROUP
MAX_SERVICE_NAME: Final = 40
_ID_ALPHABET: Final = "bcdfghjklmnpqrstvwxz2456789"
_ID_LENGTH: Final = 8


def router_name(service: str) -> str:
    """The router's Deployment, ServiceAccount, Role, RoleBinding, budget and NetworkPolicy."""
    return f"{service}-router"


def router_service_name(service: str) -> str:
    """The Service that clients talk to: the service's own name."""
    return service


def worker_name(service: str) -> str:
    """The workers' ServiceAccount, headless Service and NetworkPolicy, shared by both pools."""
    return f"{service}-worker"


def pool_name(service: str, role: Role) -> str:
    """The WorkerPool of a role, and its PodDisruptionBudget."""
    return f"{service}-{role}"


def record_name(service: str, revision: str) -> str:
    """The ControllerRevision that says what the workers of a revision are made of."""
    return f"{service}-{revision}"


def claim_template_name(service: str, role: Role, mark: str) -> str:
    """The ResourceClaimTemplate of a role; `mark` depends on what is claimed.

    At most 40 + 1 + 7 + 1 + 8 = 57 characters.
    """
    return f"{service}-{role}-{mark}"


def worker_pod_name(service: str, role: Role, group: str, rank: int = 0) -> str:
    """The pod of one rank of a worker; `group` is the worker's `stable_id`.

    At most 40 + 1 + 7 + 1 + 8 + 3 = 60 characters. The name keeps the role that the worker
    started with: after a warm role change only the label has the current one.
    """
    name = f"{service}-{role}-{group}"
    return name if rank == 0 else f"{name}-{rank}"


def admin_secret_name(service: str, mark: str) -> str:
    """The Secret with the workers' admin token; `mark` depends on the operator's key.

    At most 40 + 7 + 8 = 55 characters.
    """
    return f"{service}-admin-{mark}"


def admin_key_name(lease: str) -> str:
    """The Secret with the operator's own key; replicas that share a lease share it."""
    return f"{lease}-admin-key"


def stable_id(*parts: str | int) -> str:
    """Eight characters that depend only on `parts`, without vowels, so that they form no word."""
    number = stable_number(*parts)
    letters = []
    for _ in range(_ID_LENGTH):
        number, index = divmod(number, len(_ID_ALPHABET))
        letters.append(_ID_ALPHABET[index])
    return "".join(letters)


def stable_number(*parts: str | int) -> int:
    """A number of 64 bits that depends only on `parts`."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")
