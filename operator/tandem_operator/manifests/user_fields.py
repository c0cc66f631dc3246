"""Finds the fields of a service that the API server's refusal of a pod or Deployment is about.

What users write freely (podTemplate, engine.env) is merged into pods. The API server names fields
of the pod that it was given, whose lists have the operator's entries too; users know only theirs.
"""

import re
from typing import Any, Final

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.manifests.pod_template import LIST_KEYS, spec_of
from tandem_operator.names.labels import LABEL_ROLE, ROUTER
from tandem_operator.names.pods import ENGINE_CONTAINER

_PATH: Final = re.compile(r"(?<!\w)((?:spec|metadata)(?:\.[A-Za-z$][\w$-]*|\[[^\]]*\])+)")
_PART: Final = re.compile(r"\.([^.\[]+)|\[([^\]]*)\]")
_INNER: Final = "spec.template."
"""What the path of a Deployment's pod begins with."""
_ENV: Final = "spec.containers[0].env"
_DECODING: Final = ("cannot be handled as a", "failed to create typed", "failed to convert")
"""Words of a refusal whose cause is the type or the name of a field."""


def find_fields(message: str, sent: dict[str, Any], spec: InferenceServiceSpec) -> list[str]:
    """The paths in the service, such as `spec.decode.podTemplate.spec.foo`.

    `sent` is the pod or Deployment that was refused. Empty: it is not about what the user wrote.
    """
    role = sent["metadata"].get("labels", {}).get(LABEL_ROLE, "")
    pod = sent["spec"]["template"] if sent["kind"] == "Deployment" else sent
    part = spec.router if role == ROUTER else next(p for r, p in spec.pools.items() if r == role)
    template = {
        "spec": spec_of(part.pod_template),
        "metadata": part.pod_template.metadata.model_dump(by_alias=True, exclude_unset=True),
    }
    where = f"spec.{role}.podTemplate"
    found = [f"{where}.{path}" for path in _find(message, pod, template)]
    if role != ROUTER:
        env = [item.to_manifest() for item in spec.engine.env]
        engine = {"spec": {"containers": [{"name": ENGINE_CONTAINER, "env": env}]}}
        paths = _find(message, pod, engine)
        found += [path.replace(_ENV, "spec.engine.env") for path in paths if path.startswith(_ENV)]
    if not found and template["spec"] and any(words in message for words in _DECODING):
        # What the operator writes itself has the right types.
        found.append(where)
    return found


def _find(message: str, pod: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    found = []
    for path in _PATH.findall(message):
        inner = path.removeprefix(_INNER)
        top = inner.partition(".")[0]
        where = _walk(top, inner.removeprefix(top), pod.get(top), theirs.get(top))
        if where and where not in found:
            found.append(where)
    return found


def _walk(path: str, rest: str, ours: Any, theirs: Any) -> str:
    """What is left of a path in the pod, as a path in `theirs`; empty: it isn't there."""
    field = path
    for part in _PART.finditer(rest):
        name, selector = part.groups()
        if name is None:
            index = _index(field, selector, ours, theirs)
            if index is None:
                return ""
            ours, theirs = _entry(ours, selector), theirs[index]
            path += f"[{index}]"
            continue
        field = name
        if isinstance(theirs, list):
            # A message about types names no entry.
            theirs = next((item for item in theirs if isinstance(item, dict) and name in item), {})
        if not isinstance(theirs, dict) or (name not in theirs and ours != theirs):
            return ""
        ours = ours.get(name) if isinstance(ours, dict) else None
        theirs = theirs.get(name)
        path += f".{name}"
    return path


def _entry(ours: Any, selector: str) -> Any:
    """The entry of a list that `0` or `name="engine"` selects."""
    if not isinstance(ours, list):
        return None
    if selector.isdigit():
        return ours[int(selector)] if int(selector) < len(ours) else None
    wanted = dict(re.findall(r'(\w+)="?([^",]*)"?', selector))
    for item in ours:
        known = {key: str(value) for key, value in item.items() if key in wanted}
        if known and known.items() <= wanted.items():
            return item
    return None


def _index(field: str, selector: str, ours: Any, theirs: Any) -> int | None:
    """The place in the user's list of what a selector selects in the pod's."""
    entry = _entry(ours, selector)
    if not isinstance(theirs, list) or entry is None:
        return None
    by = LIST_KEYS.get(field)
    for index, item in enumerate(theirs):
        if item == entry or (by is not None and item.get(by) == entry.get(by)):
            return index
    return None
