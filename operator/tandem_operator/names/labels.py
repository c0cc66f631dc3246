"""The table of labels, and the sets of labels that the operator writes and selects by."""

from collections.abc import Mapping
from typing import Any, Final

from tandem_operator.names.objects import GROUP, OPERATOR
from tandem_operator.pair import Role

LABEL_PREFIXES: Final = (f"{GROUP}/", "app.kubernetes.io/")
"""Prefixes that belong to the operator: a podTemplate must not set labels with them."""

LABEL_NAME: Final = "app.kubernetes.io/name"
LABEL_INSTANCE: Final = "app.kubernetes.io/instance"
LABEL_COMPONENT: Final = "app.kubernetes.io/component"
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
LABEL_SERVICE: Final = f"{GROUP}/service"
"""On every child: the name of its InferenceService."""
LABEL_ROLE: Final = f"{GROUP}/role"
"""On workers, pools and routers: a `Role`, or `ROUTER`."""
LABEL_REVISION: Final = f"{GROUP}/revision"
"""On workers: what they run. On the router Deployment: the revision that serves."""
LABEL_GROUP: Final = f"{GROUP}/group"
"""On workers: the pods of one worker have the same value."""
LABEL_WORKER: Final = f"{GROUP}/worker"
"""`true` on the worker pods of both pools; a role label would select only one of them."""
LABEL_FAULTS: Final = f"{GROUP}/fault-injection"
"""`true` on the pods of test workers, by their podTemplate: they may inject faults."""

APP: Final = "tandem"
"""Value of LABEL_NAME."""
ROUTER: Final = "router"
"""Value of LABEL_ROLE and LABEL_COMPONENT on routers."""
WORKER: Final = "worker"
"""Value of LABEL_COMPONENT on what both pools share."""


def worker_labels(service: str, role: Role, revision: str, group: str) -> dict[str, str]:
    """The labels on every worker pod."""
    return common_labels(service, role) | {LABEL_REVISION: revision, LABEL_GROUP: group}


def common_labels(service: str, component: str) -> dict[str, str]:
    """The labels on every child; `component` is the role, or `worker` for what both pools share."""
    labels = {
        LABEL_NAME: APP,
        LABEL_INSTANCE: service,
        LABEL_COMPONENT: str(component),
        LABEL_MANAGED_BY: OPERATOR,
        LABEL_SERVICE: service,
    }
    if component in {*Role, ROUTER}:
        labels[LABEL_ROLE] = str(component)
    return labels


def was_made_for(service: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the operator made an object for a service, whoever owns it now."""
    labels = metadata.get("labels") or {}
    return labels.get(LABEL_MANAGED_BY) == OPERATOR and labels.get(LABEL_SERVICE) == service


def selector(service: str, role: Role) -> str:
    """The label selector of a pool's pods."""
    return f"{LABEL_SERVICE}={service},{LABEL_ROLE}={role}"
