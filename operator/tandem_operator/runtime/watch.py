"""Watches with kopf, which only triggers the queue and writes no annotation and no finalizer."""

import asyncio
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any

import kopf

from tandem_operator.clients.children import CHILD_KINDS, Children
from tandem_operator.clients.cluster import KINDS
from tandem_operator.names.labels import LABEL_SERVICE
from tandem_operator.names.objects import (
    AUTOSCALING_POLICIES,
    GROUP,
    INFERENCE_SERVICES,
    KOPF_FINALIZER,
    STORAGE_PREFIX,
    VERSION,
)
from tandem_operator.runtime.workqueue import WorkQueue, key_of

WITH_STATUS = ("WorkerPool", "Deployment")
"""Children whose status a pass reads; the others matter only when somebody changes them."""


class Patient:
    """Back-offs without an end, because an API server that is down will come back."""

    def __init__(self, on_retry: Callable[[], object] = lambda: None) -> None:
        self._on_retry = on_retry

    def __iter__(self) -> Iterator[float]:
        for seconds in chain((0.2, 0.5, 1, 2), repeat(3)):
            self._on_retry()
            yield seconds


def build_settings(on_retry: Callable[[], object] = lambda: None) -> kopf.OperatorSettings:
    """kopf's settings: our names, short watches, nothing written by kopf."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.persistence.finalizer = KOPF_FINALIZER
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=STORAGE_PREFIX)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=STORAGE_PREFIX)
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 300
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = 90
    settings.watching.reconnect_backoff = 0.5
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.networking.error_backoffs = Patient(on_retry)
    settings.execution.max_workers = 1
    # The process outlives the watches of a namespace; kopf would kill it some time after their end.
    settings.process.ultimate_exiting_timeout = None
    return settings


async def watch(
    registry: kopf.OperatorRegistry,
    settings: kopf.OperatorSettings,
    identity: str,
    namespace: str | None,
    on_start: Callable[[], None],
) -> None:
    """Watch a namespace (None: all of them) until a watch fails. Raises its error.

    kopf takes the handlers of signals for itself: `on_start` is called to take them back.
    `kopf.operator()` would cancel every task of the process when it ends.
    """
    scope: dict[str, Any] = {"namespaces": [namespace]} if namespace else {"clusterwide": True}
    # kopf would look the user up by its number, and a container's user has no name.
    scope["identity"] = identity
    stop = asyncio.Event()
    tasks = await kopf.spawn_tasks(
        registry=registry, settings=settings, standalone=True, stop_flag=stop, **scope
    )
    try:
        on_start()
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def build_registry(queue: WorkQueue, children: Children) -> kopf.OperatorRegistry:
    """The handlers: they keep `children`, find the service and trigger it in the queue."""
    registry = kopf.OperatorRegistry()
    seen: dict[str, tuple[Any, ...]] = {}

    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(GROUP, VERSION, INFERENCE_SERVICES, registry=registry)
    async def on_service(type: str | None, body: kopf.Body, **_: Any) -> None:  # noqa: A002
        meta = body.metadata
        # Our own status writes come back as events: only what others write is news.
        facts = (
            meta.get("generation"),
            meta.get("deletionTimestamp"),
            dict(meta.get("annotations", {})),
            # Another operator that takes a service writes this, and so does who gives it away.
            (body.get("status") or {}).get("operator"),
        )
        if type == "DELETED":
            seen.pop(meta["uid"], None)
        elif seen.get(meta["uid"]) == facts:
            return
        else:
            seen[meta["uid"]] = facts
        queue.trigger(key_of(meta.get("namespace"), meta["name"]))

    @kopf.on.event("pods", registry=registry, labels={LABEL_SERVICE: kopf.PRESENT})
    async def on_pod(body: kopf.Body, **_: Any) -> None:
        meta = body.metadata
        queue.trigger(key_of(meta.get("namespace"), meta["labels"][LABEL_SERVICE]))

    _watch_children(registry, queue, children)

    @kopf.on.event(GROUP, VERSION, AUTOSCALING_POLICIES, registry=registry)
    async def on_policy(namespace: str | None, **_: Any) -> None:
        for service_namespace, service in queue.known():
            if service_namespace == namespace:
                queue.trigger((service_namespace, service))

    return registry


def _watch_children(registry: kopf.OperatorRegistry, queue: WorkQueue, children: Children) -> None:
    async def on_child(
        *,
        type: str | None,  # noqa: A002
        body: kopf.Body,
        param: Any = "",
        **_: Any,
    ) -> None:
        meta = body.metadata
        namespace = meta.get("namespace") or "default"
        # Somebody may have taken its label away: it is still the child of the service it had.
        label = meta.get("labels", {}).get(LABEL_SERVICE)
        service = label or children.service_of(param, namespace, meta["name"])
        if not service:
            return
        if type == "DELETED":
            children.drop(param, namespace, meta["name"], int(meta["resourceVersion"]))
        elif not children.put(param, dict(body)) and param not in WITH_STATUS:
            return
        queue.trigger(key_of(namespace, service))

    for name in CHILD_KINDS:
        kind = KINDS[name]
        watched = kopf.on.event(
            kind.group, kind.version, kind.plural, registry=registry, id=name, param=name
        )
        watched(on_child)
