"""Merges a user's podTemplate into a pod of the operator, like a strategic merge patch.

- Objects merge key by key; the user's value wins; an explicit null removes the operator's.
- Lists whose entries have names (`containers`, `initContainers`, `volumes`, `env`, `ports`,
  `imagePullSecrets`, `resourceClaims`) merge by `name`; `volumeMounts` by `mountPath`;
  `hostAliases` by `ip`; `topologySpreadConstraints` by `topologyKey`. Unknown entries are added.
- Every other list (`tolerations`, `command`, `args` …): `tolerations` are added, the rest replaced.
- Labels and annotations are added; those of the operator can't be replaced.
"""

from typing import Any

from tandem_operator.api.pod_template import PodTemplate

_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "ports": "name",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "volumeMounts": "mountPath",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}
_ADDED = {"tolerations"}


def merge_template(pod: dict[str, Any], template: PodTemplate) -> dict[str, Any]:
    """`pod` (with metadata and spec) shaped by `template`; neither is changed."""
    spec = template.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    metadata = dict(pod["metadata"])
    for field, values in (
        ("labels", template.metadata.labels),
        ("annotations", template.metadata.annotations),
    ):
        if values or field in metadata:
            metadata[field] = {**values, **metadata.get(field, {})}
    return {**pod, "metadata": metadata, "spec": _objects(pod["spec"], spec)}


def _objects(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _value(key, merged.get(key), value)
    return merged


def _value(key: str, ours: Any, theirs: Any) -> Any:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return _objects(ours, theirs)
    if isinstance(ours, list) and isinstance(theirs, list):
        if key in _ADDED:
            return ours + [item for item in theirs if item not in ours]
        if key in _KEYS:
            return _lists(_KEYS[key], ours, theirs)
    return theirs


def _lists(by: str, ours: list[Any], theirs: list[Any]) -> list[Any]:
    merged = list(ours)
    places = {item.get(by): index for index, item in enumerate(merged)}
    for item in theirs:
        index = places.get(item.get(by))
        if index is None:
            merged.append(item)
        else:
            merged[index] = _objects(merged[index], item)
    return merged
