"""Merges a user's podTemplate into a pod of the operator, like a strategic merge patch.

- Objects merge key by key and the user's value wins. An explicit null removes the operator's value.
  `kubectl apply` doesn't send nulls, so `$patch: delete` in an object does the same, and
  `$patch: replace` puts the object in the place of the operator's instead of merging it.
- Lists whose entries have names (`containers`, `initContainers`, `volumes`, `env`, `ports`,
  `imagePullSecrets`, `resourceClaims`) merge by `name`; `volumeMounts` by `mountPath`;
  `hostAliases` by `ip`; `topologySpreadConstraints` by `topologyKey`. Unknown entries are added.
- A volume or a probe has one source: if the user names another, the operator's is gone.
- Entries of `tolerations`, of the terms of an affinity, and of `add` and `drop` of capabilities are
  added. Every other list (`command`, `args` …) is replaced.
- Labels and annotations are added; those of the operator can't be replaced.
"""

from typing import Any, Final

from tandem_operator.api.pod_template import PodTemplate

LIST_KEYS: Final = {
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
_ADDED: Final = {
    "tolerations",
    "requiredDuringSchedulingIgnoredDuringExecution",
    "preferredDuringSchedulingIgnoredDuringExecution",
    "add",
    "drop",
}
_PATCH: Final = "$patch"
_DELETE, _REPLACE = "delete", "replace"
_ENV_SOURCES: Final = frozenset({"value", "valueFrom"})
_PROBES: Final = ("startupProbe", "readinessProbe", "livenessProbe")
_PROBE_SOURCES: Final = frozenset({"exec", "grpc", "httpGet", "tcpSocket"})


def merge_template(pod: dict[str, Any], template: PodTemplate) -> dict[str, Any]:
    """`pod` (with metadata and spec) shaped by `template`; neither is changed."""
    metadata = dict(pod["metadata"])
    for field, values in (
        ("labels", template.metadata.labels),
        ("annotations", template.metadata.annotations),
    ):
        if values or field in metadata:
            metadata[field] = {**values, **metadata.get(field, {})}
    return {**pod, "metadata": metadata, "spec": _objects(pod["spec"], spec_of(template))}


def spec_of(template: PodTemplate) -> dict[str, Any]:
    """The pod spec of a template, as its user wrote it."""
    return template.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _objects(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        if value is None or _directive(value) == _DELETE:
            merged.pop(key, None)
        else:
            merged[key] = _value(key, merged.get(key), value)
    return merged


def _directive(value: Any) -> str:
    return str(value.get(_PATCH, "")) if isinstance(value, dict) else ""


def _value(key: str, ours: Any, theirs: Any) -> Any:
    if isinstance(theirs, dict):
        return _object(key, ours if isinstance(ours, dict) else {}, theirs)
    if isinstance(theirs, list):
        listed = ours if isinstance(ours, list) else []
        if key in LIST_KEYS:
            return _lists(key, listed, theirs)
        if key in _ADDED:
            return listed + [item for item in theirs if item not in listed]
    return theirs


def _object(key: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    if _directive(theirs) == _REPLACE:
        return _objects({}, {name: value for name, value in theirs.items() if name != _PATCH})
    return _objects(_without_other_source(key, ours, theirs), theirs)


def _lists(key: str, ours: list[Any], theirs: list[Any]) -> list[Any]:
    by, merged = LIST_KEYS[key], list(ours)
    for item in theirs:
        places = [index for index, mine in enumerate(merged) if mine.get(by) == item.get(by)]
        if _directive(item) == _DELETE:
            merged = [mine for index, mine in enumerate(merged) if index not in places]
        elif places:
            merged[places[0]] = _object(key, merged[places[0]], item)
        else:
            merged.append(_object(key, {}, item))
    return merged


def _without_other_source(key: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The operator's volume, probe or variable without its source, if the user's has another."""
    if key == "volumes":
        sources = frozenset(ours.keys() | theirs.keys()) - {"name"}
    elif key in _PROBES:
        sources = _PROBE_SOURCES
    elif key == "env":
        sources = _ENV_SOURCES
    elif key == "valueFrom":
        sources = frozenset(ours.keys() | theirs.keys())
    else:
        return ours
    named = {name for name in sources & theirs.keys() if theirs[name] is not None}
    if not named or named <= ours.keys():
        return ours
    return {name: value for name, value in ours.items() if name not in sources}
