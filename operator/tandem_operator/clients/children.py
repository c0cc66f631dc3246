"""What the API server last said about every child: kept by watches, by writes and by a full list.

A pass compares with this and reads nothing. A state that is older than the one known is dropped, so
a late event never hides the operator's own write.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from tandem_operator.facts.child import ChildView
from tandem_operator.names.labels import LABEL_SERVICE
from tandem_operator.names.objects import CLAIM_TEMPLATE, CONTROLLER_REVISION

CHILD_KINDS: Final = (
    "WorkerPool",
    "Deployment",
    "Service",
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "NetworkPolicy",
    "PodDisruptionBudget",
    CONTROLLER_REVISION,
)
"""Every kind that is written for a service, except pods. Each is watched, and deleted when it isn't
wanted any more."""

OPTIONAL_KINDS: Final = (CLAIM_TEMPLATE,)
"""Kinds that are written for some services, and that not every cluster serves. They are listed now
and then instead of watched: they can't be changed, and a watch that fails ends the process."""

ChildKey = tuple[str, str, str]
"""(kind, namespace, name)"""
_NOT_COMPARED: Final = ("resourceVersion", "generation", "managedFields")


@dataclass(frozen=True)
class _Known:
    view: ChildView
    service: str
    version: int
    content: str


class Children:
    """The children of all services, by kind, namespace and name.

    `on_gone` is called with each one that is forgotten.
    """

    def __init__(self) -> None:
        self._known: dict[ChildKey, _Known] = {}
        self.on_gone: Callable[[ChildKey], None] = _ignore

    def put(self, kind: str, body: dict[str, Any]) -> bool:
        """Take over a state, unless a newer one is known. Returns whether it has other content."""
        meta = body["metadata"]
        key = (kind, meta.get("namespace") or "", meta["name"])
        service = (meta.get("labels") or {}).get(LABEL_SERVICE, "")
        version, known = int(meta.get("resourceVersion") or 0), self._known.get(key)
        if known is not None and version < known.version:
            return False
        owners = frozenset(owner["uid"] for owner in meta.get("ownerReferences") or ())
        if not service and known is not None:
            service = known.service
        view = ChildView(kind, meta["name"], meta.get("uid", ""), owners)
        self._known[key] = _Known(view, service, version, content_of(body))
        return known is None or known.content != self._known[key].content

    def drop(self, kind: str, namespace: str, name: str, version: int | None = None) -> None:
        """Forget a child that is gone; with `version`, only if nothing newer is known."""
        known = self._known.get((kind, namespace, name))
        if known is not None and (version is None or known.version <= version):
            del self._known[(kind, namespace, name)]
            self.on_gone((kind, namespace, name))

    def service_of(self, kind: str, namespace: str, name: str) -> str:
        """The service whose label a child had when it was last seen with one; empty: unknown."""
        known = self._known.get((kind, namespace, name))
        return known.service if known is not None else ""

    def uid(self, kind: str, namespace: str, name: str) -> str:
        """The uid of a child; empty if there is no such one."""
        known = self._known.get((kind, namespace, name))
        return known.view.uid if known is not None else ""

    def content(self, kind: str, namespace: str, name: str) -> str:
        """A digest of what others could have changed in a child; empty if there is no such one."""
        known = self._known.get((kind, namespace, name))
        return known.content if known is not None else ""

    def of_service(self, namespace: str, service: str) -> tuple[ChildView, ...]:
        """The objects with a service's label, in a fixed order, whoever owns them."""
        return tuple(
            known.view
            for key, known in sorted(self._known.items())
            if key[1] == namespace and known.service == service
        )

    def versions(self, kind: str, namespace: str | None) -> dict[ChildKey, int]:
        """The versions that are known, to give back to `replace`; namespace None: of all."""
        return {
            key: known.version
            for key, known in self._known.items()
            if key[0] == kind and namespace in (None, key[1])
        }

    def replace(
        self, kind: str, before: dict[ChildKey, int], bodies: Iterable[dict[str, Any]]
    ) -> None:
        """Take over a full list. What was known `before` it was asked for and isn't in it is gone,
        unless it was written since."""
        listed = set()
        for body in bodies:
            self.put(kind, body)
            listed.add((kind, body["metadata"].get("namespace") or "", body["metadata"]["name"]))
        for key in before.keys() - listed:
            self.drop(*key, version=before[key])


def _ignore(child: ChildKey) -> None:
    """Nobody keeps anything about a child."""


def content_of(body: dict[str, Any]) -> str:
    """A digest of an object without its status and without what changes with every write."""
    meta = {key: value for key, value in body["metadata"].items() if key not in _NOT_COMPARED}
    kept = {
        key: value
        for key, value in body.items()
        if key not in ("apiVersion", "kind", "status", "metadata")
    }
    text = json.dumps([meta, kept], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
