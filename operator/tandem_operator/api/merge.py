"""How lists merge under server-side apply: the `x-kubernetes-list-type` markers."""

from typing import Any

ATOMIC: dict[str, Any] = {"x-kubernetes-list-type": "atomic"}
SET: dict[str, Any] = {"x-kubernetes-list-type": "set"}


def keyed_by(*keys: str) -> dict[str, Any]:
    """A list whose entries are merged by these keys (`x-kubernetes-list-type: map`)."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}
