"""Reads a worker pod: whether it is started, ready, failed, in trouble or being removed."""

from datetime import UTC, datetime
from typing import Any

from tandem_operator.clients.cluster import JsonObject
from tandem_operator.facts.observed import PodAddress, RouterTrouble
from tandem_operator.facts.worker import PodFailure, WorkerPod, WorkerPorts
from tandem_operator.names.annotations import (
    ANNOTATION_BOOTSTRAP_PORT,
    ANNOTATION_COST,
    ANNOTATION_DRAINING,
    ANNOTATION_HTTP_PORT,
    ANNOTATION_MOVING,
    ANNOTATION_RESTARTS,
    ANNOTATION_SERVED,
    ANNOTATION_WIRE_PORT,
)
from tandem_operator.names.labels import LABEL_GROUP, LABEL_REVISION, LABEL_ROLE, ROUTER
from tandem_operator.names.pods import (
    ENGINE_CONTAINER,
    MEMLOCK_CONTAINER,
    PORT_NAME_METRICS,
    PORT_ROUTER_METRICS,
    PORT_WORKER_BOOTSTRAP,
    PORT_WORKER_HTTP,
    PORT_WORKER_WIRE,
    ROUTER_CONTAINER,
    VOLUME_ADMIN_TOKEN,
)
from tandem_operator.pair import Role

_HARMLESS = ("ContainerCreating", "PodInitializing")
# Of a deleted pod: after its drain, or by SIGTERM before it could drain.
_ORDERLY_ENDS = (0, 143)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def read_pod(pod: JsonObject) -> WorkerPod | None:
    """A worker, or None for any other pod."""
    meta, status = pod["metadata"], pod.get("status") or {}
    labels, notes = meta.get("labels") or {}, meta.get("annotations") or {}
    role = labels.get(LABEL_ROLE)
    if role not in set(Role):
        return None
    engine = _container(status.get("containerStatuses"), ENGINE_CONTAINER)
    reason, trouble = _trouble(status)
    ready = _condition(status, "Ready")
    return WorkerPod(
        name=meta["name"],
        uid=meta["uid"],
        role=Role(role),
        revision=labels.get(LABEL_REVISION, ""),
        group=labels.get(LABEL_GROUP, ""),
        created=read_time(meta.get("creationTimestamp")) or _EPOCH,
        node=pod.get("spec", {}).get("nodeName", ""),
        ip=status.get("podIP", ""),
        ports=WorkerPorts(
            _number(notes, ANNOTATION_HTTP_PORT, PORT_WORKER_HTTP),
            _number(notes, ANNOTATION_WIRE_PORT, PORT_WORKER_WIRE),
            _number(notes, ANNOTATION_BOOTSTRAP_PORT, PORT_WORKER_BOOTSTRAP),
        ),
        ready=ready.get("status") == "True",
        ready_since=read_time(ready.get("lastTransitionTime")),
        deleting=bool(meta.get("deletionTimestamp")),
        draining_since=_draining_since(notes),
        moving=notes.get(ANNOTATION_MOVING) == "true",
        cost=_number(notes, ANNOTATION_COST, 0),
        restarts=_number(notes, ANNOTATION_RESTARTS, 0),
        started="running" in engine.get("state", {}),
        served=_served(notes, ready, engine),
        trouble=trouble,
        trouble_reason=reason,
        failure=_failure(meta, status, engine),
        admin_secret=_admin_secret(pod),
        memlock=_memlock(status),
        manifest=pod,
    )


def read_router_pod(pod: JsonObject) -> PodAddress | None:
    """Where a ready router tells its metrics, or None for any other pod."""
    meta, status = pod["metadata"], pod.get("status") or {}
    is_router = (meta.get("labels") or {}).get(LABEL_ROLE) == ROUTER
    ready = _condition(status, "Ready").get("status") == "True"
    if not (is_router and ready and status.get("podIP")) or meta.get("deletionTimestamp"):
        return None
    return PodAddress(meta["uid"], status["podIP"], _router_port(pod))


def _router_port(pod: JsonObject) -> int:
    router = _container(pod.get("spec", {}).get("containers"), ROUTER_CONTAINER)
    metrics = _container(router.get("ports"), PORT_NAME_METRICS)
    return int(metrics.get("containerPort") or PORT_ROUTER_METRICS)


def _served(notes: dict[str, str], ready: JsonObject, engine: JsonObject) -> bool:
    """Whether the pod was ready at any time: else Ready is False since before its engine ran."""
    if ready.get("status") == "True" or notes.get(ANNOTATION_SERVED) == "true":
        return True
    state = engine.get("state", {})
    ran = state.get("running") or state.get("terminated") or {}
    since, began = read_time(ready.get("lastTransitionTime")), read_time(ran.get("startedAt"))
    return since is not None and began is not None and since > began


def read_router_trouble(pod: JsonObject) -> RouterTrouble | None:
    """What keeps a router from being ready, or None if nothing is known or it is no router."""
    meta, status = pod["metadata"], pod.get("status") or {}
    if (meta.get("labels") or {}).get(LABEL_ROLE) != ROUTER or meta.get("deletionTimestamp"):
        return None
    reason, message = _trouble(status)
    return RouterTrouble(meta["name"], reason, message) if reason else None


def waits_for_volumes(pod: JsonObject) -> bool:
    """Whether a pod has a node but none of its containers could be made yet."""
    status = pod.get("status") or {}
    containers = [
        *(status.get("initContainerStatuses") or []),
        *status.get("containerStatuses", []),
    ]
    waiting = [item.get("state", {}).get("waiting") or {} for item in containers]
    return bool(waiting) and all(item.get("reason") in _HARMLESS for item in waiting)


def with_warning(pod: JsonObject, event: JsonObject) -> JsonObject:
    """The pod with an event's reason in place of its containers' empty one."""
    state = {"waiting": {"reason": event.get("reason"), "message": event.get("note")}}

    def told(items: list[JsonObject]) -> list[JsonObject]:
        return [{**item, "state": state} for item in items]

    status = pod["status"]
    key = "initContainerStatuses" if status.get("initContainerStatuses") else "containerStatuses"
    return {**pod, "status": {**status, key: told(status[key])}}


def _draining_since(notes: dict[str, str]) -> datetime | None:
    marked = notes.get(ANNOTATION_DRAINING)
    if not marked:
        return None
    # Someone who marks a pod by hand may write anything: it drains all the same.
    return read_time(marked) or _EPOCH


def _failure(meta: JsonObject, status: JsonObject, engine: JsonObject) -> PodFailure | None:
    """How the engine ended. With a sidecar the pod goes on running then: its phase says nothing."""
    ended = engine.get("state", {}).get("terminated") or {}
    if not ended and status.get("phase") not in ("Failed", "Succeeded"):
        return None
    container = ENGINE_CONTAINER
    if not ended:
        container, ended = _failed_init(status)
    if meta.get("deletionTimestamp") and ended.get("exitCode") in _ORDERLY_ENDS:
        return None
    at = read_time(ended.get("finishedAt")) or _ended_at(status)
    reason = status.get("reason") or ended.get("reason") or str(status.get("phase"))
    return PodFailure(
        exit_code=ended.get("exitCode"),
        reason=reason if container == ENGINE_CONTAINER else f"container {container}: {reason}",
        at=at,
        log=str(ended.get("message") or status.get("message") or ""),
        container=container,
    )


def _failed_init(status: JsonObject) -> tuple[str, JsonObject]:
    """The init container that failed, with its end; the engine and nothing, if none did."""
    for container in status.get("initContainerStatuses") or []:
        ended = container.get("state", {}).get("terminated") or {}
        if ended.get("exitCode"):
            return container["name"], ended
    return ENGINE_CONTAINER, {}


def _ended_at(status: JsonObject) -> datetime:
    times = (read_time(c.get("lastTransitionTime")) for c in status.get("conditions") or [])
    known = [time for time in times if time is not None]
    return max(known, default=read_time(status.get("startTime")) or _EPOCH)


def _trouble(status: JsonObject) -> tuple[str, str]:
    """Why a pod is not ready, as a reason and a sentence; empty if nothing is known."""
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return str(scheduled.get("reason") or "Pending"), str(scheduled.get("message") or "")
    containers = status.get("containerStatuses") or []
    for container in [*(status.get("initContainerStatuses") or []), *containers]:
        waiting = container.get("state", {}).get("waiting") or {}
        reason = str(waiting.get("reason") or "")
        if reason and reason not in _HARMLESS:
            said = f"container {container.get('name')}: {reason}: "
            return reason, said + (waiting.get("message") or "no message") + _last_end(container)
    return _ended_sidecar(containers)


def _last_end(container: JsonObject) -> str:
    """How a container that restarts ended the last time."""
    ended = container.get("lastState", {}).get("terminated") or {}
    if not ended:
        return ""
    end = f"; it ended with {_exit(ended)}"
    last = str(ended.get("message") or "").strip()
    return f"{end}: {last[-500:]}" if last else end


def _exit(ended: JsonObject) -> str:
    return f"exit code {ended.get('exitCode')} ({ended.get('reason') or 'no reason'})"


def _ended_sidecar(containers: list[JsonObject]) -> tuple[str, str]:
    for container in containers:
        ended = container.get("state", {}).get("terminated") or {}
        if ended and container.get("name") not in (ENGINE_CONTAINER, ROUTER_CONTAINER):
            return "SidecarEnded", (
                f"the container {container.get('name')} ended with {_exit(ended)}, so the pod"
                " can't be ready again: delete the pod, and make the container an init container"
                " with restartPolicy: Always"
            )
    return "", ""


def _memlock(status: JsonObject) -> str:
    check = _container(status.get("initContainerStatuses"), MEMLOCK_CONTAINER)
    ended = check.get("state", {}).get("terminated") or {}
    return str(ended.get("message") or "").strip()


def _admin_secret(pod: JsonObject) -> str:
    volumes = pod.get("spec", {}).get("volumes") or []
    mounted = (item.get("secret") for item in volumes if item.get("name") == VOLUME_ADMIN_TOKEN)
    return str((next(mounted, None) or {}).get("secretName") or "")


def _condition(status: JsonObject, kind: str) -> dict[str, Any]:
    found = (c for c in status.get("conditions") or [] if c.get("type") == kind)
    return next(found, {})


def _container(statuses: list[JsonObject] | None, name: str) -> JsonObject:
    return next((item for item in statuses or [] if item.get("name") == name), {})


def _number(notes: dict[str, str], name: str, default: int) -> int:
    try:
        return int(notes.get(name, default))
    except ValueError:
        return default


def read_time(text: str | None) -> datetime | None:
    """An RFC 3339 time, or None when there is none or the text is not a time."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
