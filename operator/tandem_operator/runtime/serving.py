"""Serves each namespace by itself, and knows which ones are not served.

A namespace is served while its objects can be read. When they can't (its Role is gone, because the
namespace is being deleted; or the CRDs are), its services are dropped from the queue, nothing else
changes, and it is tried again for ever. Any other failure of a watch ends the process.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from tandem_operator.clients.children import CHILD_KINDS, OPTIONAL_KINDS, Children
from tandem_operator.clients.cluster import Cluster
from tandem_operator.errors import ClusterError
from tandem_operator.names.labels import LABEL_SERVICE
from tandem_operator.names.objects import AUTOSCALING_POLICY, INFERENCE_SERVICE
from tandem_operator.runtime.metrics import Metrics
from tandem_operator.runtime.workqueue import WorkQueue, key_of

RETRY_SECONDS: Final = (1.0, 2.0, 5.0)
"""Pauses between two tries to read a namespace; the last one is repeated."""
UNSERVED: Final = (403, 404)
"""Answers by which a namespace is not served: no right to read it, or no CRD."""
WATCHED: Final = {
    INFERENCE_SERVICE: None,
    AUTOSCALING_POLICY: None,
    "Pod": LABEL_SERVICE,
    **dict.fromkeys(CHILD_KINDS, LABEL_SERVICE),
}
"""The kinds that are watched, and the label by which."""
EVERYWHERE: Final = "all namespaces"

Watch = Callable[[str | None], Awaitable[None]]
"""Watches a namespace (None: all of them) without end. Raises when a watch fails."""

log = structlog.get_logger("tandem.serving")


class Serving:
    """Reads, watches and resyncs namespaces, each in a task of its own."""

    def __init__(
        self,
        cluster: Cluster,
        queue: WorkQueue,
        children: Children,
        metrics: Metrics,
        watch: Watch,
        namespaces: tuple[str, ...],
        resync_seconds: float,
    ) -> None:
        self._cluster = cluster
        self._queue = queue
        self._children = children
        self._metrics = metrics
        self._watch = watch
        self._scopes: tuple[str | None, ...] = namespaces or (None,)
        self._resync_seconds = resync_seconds
        self.problems: dict[str, str] = {}
        """Why a namespace is not served, by its name."""

    async def run(self) -> None:
        """Serve every namespace. Ends only with the error of a watch that should work."""
        async with asyncio.TaskGroup() as group:
            for namespace in self._scopes:
                group.create_task(self._serve(namespace), name=f"serve-{namespace}")

    async def _serve(self, namespace: str | None) -> None:
        while True:
            await self._readable(namespace)
            self._note(namespace, "")
            tasks = [
                asyncio.ensure_future(self._watch(namespace)),
                asyncio.create_task(self._resync(namespace)),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            failed = next((error for task in done if (error := task.exception())), None)
            problem = await self._problem(namespace)
            if failed is not None and not problem:
                raise failed
            self._drop(namespace)
            self._note(namespace, problem or "its watches ended")

    async def _readable(self, namespace: str | None) -> None:
        """Return when everything in a namespace that has to be watched can be listed."""
        tries = 0
        while problem := await self._problem(namespace):
            self._note(namespace, problem)
            await asyncio.sleep(RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)])
            tries += 1

    async def _problem(self, namespace: str | None) -> str:
        """Why a namespace can't be served now; empty if it can."""
        for kind, label in WATCHED.items():
            try:
                await self._cluster.list(kind, namespace, label)
            except ClusterError as error:
                return f"{kind}: {error}"
        return ""

    async def _resync(self, namespace: str | None) -> None:
        """Trigger every service now and then. Raises ClusterError when that isn't served."""
        while True:
            try:
                await resync(self._cluster, self._queue, self._children, namespace)
            except ClusterError as error:
                if error.status in UNSERVED:
                    raise
                log.warning("resync failed", namespace=namespace, error=str(error))
            await asyncio.sleep(self._resync_seconds)

    def _drop(self, namespace: str | None) -> None:
        for key in self._queue.known():
            if namespace in (None, key[0]):
                self._queue.forget(key)

    def _note(self, namespace: str | None, problem: str) -> None:
        name = namespace or EVERYWHERE
        self._metrics.namespace_served.labels(name).set(not problem)
        if problem == self.problems.get(name, ""):
            return
        if problem:
            self.problems[name] = problem
            log.warning("not served", namespace=name, problem=problem)
        else:
            del self.problems[name]
            log.info("served again", namespace=name)


async def resync(
    cluster: Cluster, queue: WorkQueue, children: Children, namespace: str | None
) -> int:
    """Trigger every service, in case events were missed. Returns how many services there are.

    Nothing but a full list shows that a child is gone whose deletion no watch has seen.
    """
    for kind in (*CHILD_KINDS, *OPTIONAL_KINDS):
        before = children.versions(kind, namespace)
        try:
            found = await cluster.list(kind, namespace, LABEL_SERVICE)
        except ClusterError as error:
            if kind in CHILD_KINDS or error.status not in UNSERVED:
                raise
            found = []
        children.replace(kind, before, found)
    services = await cluster.list(INFERENCE_SERVICE, namespace)
    for service in services:
        meta = service["metadata"]
        queue.trigger(key_of(meta["namespace"], meta["name"]))
    return len(services)
