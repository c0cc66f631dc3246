"""What every container of the operator has: few rights, a read-only root, resources."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tandem_operator.api.pool import ContainerResources

_WRITABLE: Final = {"tandem-tmp": "/tmp"}
"""Folders of a read-only root that are written, by the name of their volume. HOME and the caches
are in the cache volume (`storage.py`)."""


@dataclass(frozen=True)
class Defaults:
    """Quantities of the resources of which the user says nothing."""

    requests: Mapping[str, str]
    limits: Mapping[str, str] = field(default_factory=dict)


ENGINE_DEFAULTS: Final = Defaults({"cpu": "100m", "memory": "256Mi"})
"""Without limits: how much a worker needs depends on its model."""
ROUTER_DEFAULTS: Final = Defaults({"cpu": "100m", "memory": "256Mi"}, {"cpu": "4", "memory": "4Gi"})
CHECK_DEFAULTS: Final = Defaults({"cpu": "50m", "memory": "32Mi"}, {"cpu": "50m", "memory": "32Mi"})
"""Requests equal limits, so that a pod whose other containers do the same stays Guaranteed."""


def writable_volumes() -> list[dict[str, Any]]:
    """Volumes of one pod for `writable_mounts`."""
    return [{"name": name, "emptyDir": {}} for name in _WRITABLE]


def writable_mounts() -> list[dict[str, Any]]:
    """What a container writes although its root is read-only."""
    return [{"name": name, "mountPath": path} for name, path in _WRITABLE.items()]


def container_security(capabilities: tuple[str, ...] = ()) -> dict[str, Any]:
    """The security context of a container that needs only these capabilities."""
    rights: dict[str, Any] = {"drop": ["ALL"]}
    if capabilities:
        rights["add"] = list(capabilities)
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": rights,
    }


def build_resources(defaults: Defaults, wanted: ContainerResources | None = None) -> dict[str, Any]:
    """The user's resources; of those that the user doesn't mention, the defaults."""
    resources: dict[str, Any] = {}
    if wanted is not None:
        resources = wanted.model_dump(
            mode="json", by_alias=True, exclude_none=True, exclude_defaults=True
        )
    mentioned = {*resources.get("requests", {}), *resources.get("limits", {})}
    for kind, amounts in (("requests", defaults.requests), ("limits", defaults.limits)):
        added = {name: amount for name, amount in amounts.items() if name not in mentioned}
        if added:
            resources[kind] = {**resources.get(kind, {}), **added}
    return resources
