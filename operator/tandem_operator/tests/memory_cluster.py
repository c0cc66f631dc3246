"""The client's methods over a dictionary, for tests of what uses the client."""

from copy import deepcopy
from itertools import count
from typing import Any

from tandem_operator.errors import ClusterError, ConflictError, MissingError
from tandem_operator.names.objects import OPERATOR

Key = tuple[str, str, str]


class MemoryCluster:
    """Objects by (kind, namespace, name). `fail` makes the next calls of a method raise."""

    def __init__(self) -> None:
        self.objects: dict[Key, dict[str, Any]] = {}
        self.calls: list[tuple[str, str, str]] = []
        self.fail: dict[str, ClusterError] = {}
        self.warnings: dict[str, dict[str, Any]] = {}  # events by pod
        self._numbers = count(1)

    def put(self, body: dict[str, Any]) -> dict[str, Any]:
        """Store an object as if it had been there before."""
        meta = body["metadata"]
        number = next(self._numbers)
        meta.setdefault("uid", f"uid-{number}")
        meta["resourceVersion"] = str(number)
        meta.setdefault("creationTimestamp", "2026-11-22T12:00:00Z")
        self.objects[(body["kind"], meta.get("namespace", ""), meta["name"])] = body
        return body

    async def get(self, kind: str, name: str, namespace: str | None = None) -> dict[str, Any]:
        self._enter("get", kind, name)
        found = self.objects.get((kind, namespace or "", name))
        if found is None:
            raise MissingError(404, f"{kind} {name} not found")
        return deepcopy(found)

    async def list(
        self, kind: str, namespace: str | None = None, label_selector: str | None = None
    ) -> list[dict[str, Any]]:
        self._enter("list", kind, "")
        parts = [part.partition("=") for part in (label_selector or "").split(",") if part]
        return [
            deepcopy(body)
            for (k, ns, _), body in self.objects.items()
            if k == kind
            and namespace in (None, ns)
            and all(_has(body, label, value if equals else None) for label, equals, value in parts)
        ]

    async def create(self, body: dict[str, Any]) -> dict[str, Any]:
        meta = body["metadata"]
        self._enter("create", body["kind"], meta.get("name", ""))
        if (body["kind"], meta.get("namespace", ""), meta["name"]) in self.objects:
            raise ConflictError(409, "exists")
        return self.put(deepcopy(body))

    async def apply(self, body: dict[str, Any], manager: str = OPERATOR) -> dict[str, Any]:
        meta = body["metadata"]
        self._enter("apply", body["kind"], meta["name"])
        key = (body["kind"], meta.get("namespace", ""), meta["name"])
        old = self.objects.get(key, {"metadata": {}})
        seen = meta.get("resourceVersion")
        if seen and seen != old["metadata"].get("resourceVersion"):
            raise ConflictError(409, "changed")
        merged = {**old, **deepcopy(body)}
        merged["metadata"] = {**old["metadata"], **deepcopy(meta)}
        if body["kind"] == "Deployment":
            _own_spec(merged, old, body, manager)
        return deepcopy(old if merged == old else self.put(merged))

    async def merge(
        self,
        kind: str,
        name: str,
        namespace: str | None,
        body: dict[str, Any],
        subresource: str = "",
    ) -> dict[str, Any]:
        self._enter("merge", kind, name)
        found = self.objects.get((kind, namespace or "", name))
        if found is None:
            raise MissingError(404, "not found")
        uid = body.get("metadata", {}).get("uid")
        if uid and uid != found["metadata"]["uid"]:
            raise ConflictError(409, "other uid")
        version = body.get("metadata", {}).get("resourceVersion")
        if version and version != found["metadata"]["resourceVersion"]:
            raise ConflictError(409, "changed")
        merge_into(found, body)
        return self.put(found)

    async def replace(self, body: dict[str, Any]) -> dict[str, Any]:
        meta = body["metadata"]
        self._enter("replace", body["kind"], meta["name"])
        found = await self.get(body["kind"], meta["name"], meta.get("namespace"))
        if meta.get("resourceVersion") != found["metadata"]["resourceVersion"]:
            raise ConflictError(409, "changed")
        return self.put(deepcopy(body))

    async def delete(
        self,
        kind: str,
        name: str,
        namespace: str | None = None,
        *,
        uid: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        self._enter("delete", kind, name)
        found = self.objects.get((kind, namespace or "", name))
        if found is not None and uid and found["metadata"]["uid"] != uid:
            raise ConflictError(409, "other uid")
        self.objects.pop((kind, namespace or "", name), None)

    async def pod_log(self, namespace: str, pod: str, container: str, num_lines: int) -> str:
        self._enter("pod_log", "Pod", pod)
        return "last words"

    async def last_warning(self, namespace: str, pod: str) -> dict[str, Any] | None:
        self._enter("last_warning", "Pod", pod)
        return self.warnings.get(pod)

    def _enter(self, method: str, kind: str, name: str) -> None:
        self.calls.append((method, kind, name))
        if method in self.fail:
            raise self.fail[method]


def _own_spec(
    merged: dict[str, Any], old: dict[str, Any], body: dict[str, Any], manager: str
) -> None:
    """The spec after an apply: a field that its only manager left out has its default again."""
    before = old["metadata"].get("managedFields", [])
    others = [entry for entry in before if entry["manager"] != manager]
    kept = {field[2:] for entry in others for field in entry["fieldsV1"]["f:spec"]}
    spec = {key: value for key, value in old.get("spec", {}).items() if key in kept}
    merged["spec"] = {"replicas": 1, **spec, **deepcopy(body["spec"])}
    own: dict[str, Any] = {"f:spec": {f"f:{field}": {} for field in body["spec"]}}
    merged["metadata"]["managedFields"] = [
        *others,
        {"manager": manager, "operation": "Apply", "fieldsV1": own},
    ]


def _has(body: dict[str, Any], label: str, value: str | None) -> bool:
    labels = body["metadata"].get("labels", {})
    return label in labels and value in (None, labels[label])


def merge_into(target: dict[str, Any], patch: dict[str, Any]) -> None:
    """JSON merge patch."""
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            merge_into(target.setdefault(key, {}), value)
        else:
            target[key] = value
