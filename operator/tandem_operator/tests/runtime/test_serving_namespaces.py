"""Each namespace is served by itself; what isn't served is told, and tried again."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from deadlines import patience

from tandem_operator.clients.children import Children
from tandem_operator.errors import ClusterError
from tandem_operator.runtime import serving as module
from tandem_operator.runtime.metrics import Metrics
from tandem_operator.runtime.serving import EVERYWHERE, Serving
from tandem_operator.runtime.workqueue import Key, WorkQueue
from tandem_operator.tests.memory_cluster import MemoryCluster
from tandem_operator.tests.polling import until


class Namespaces(MemoryCluster):
    """A cluster in which some namespaces answer with an error."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str | None, ClusterError] = {}

    def refuse(self, namespace: str | None, status: int = 403) -> None:
        self.refused[namespace] = ClusterError(status, "is forbidden")

    async def list(self, kind: str, namespace: str | None = None, *more: Any) -> list[Any]:
        if namespace in self.refused:
            raise self.refused[namespace]
        return await super().list(kind, namespace, *more)

    def add_service(self, namespace: str, name: str) -> None:
        meta = {"name": name, "namespace": namespace}
        self.put({"kind": "InferenceService", "metadata": meta})


class Room:
    """Serving over a cluster of two namespaces, with watches that a test ends."""

    def __init__(self, *namespaces: str) -> None:
        self.cluster = Namespaces()
        self.metrics = Metrics()
        self.passes: list[Key] = []
        self.watches: dict[str | None, asyncio.Future[None]] = {}
        self.num_watches = 0
        self.queue = WorkQueue(self.work, settle_seconds=0.0)
        self.queue.open()
        cluster: Any = self.cluster
        self.serving = Serving(
            cluster, self.queue, Children(), self.metrics, self.watch, namespaces, 0.02
        )

    async def work(self, key: Key) -> float | None:
        self.passes.append(key)
        return 1000.0

    async def watch(self, namespace: str | None) -> None:
        self.num_watches += 1
        self.watches[namespace] = asyncio.get_running_loop().create_future()
        await self.watches[namespace]

    def served(self, namespace: str) -> float | None:
        name, labels = "tandem_operator_namespace_served", {"watched_namespace": namespace}
        return self.metrics.registry.get_sample_value(name, labels)


@pytest.fixture
async def room(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Room]:
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.01,))
    made = Room("a", "b")
    for namespace in ("a", "b"):
        made.cluster.add_service(namespace, "one")
    yield made
    await made.queue.close()


async def test_a_forbidden_namespace_keeps_no_other_from_being_served(room: Room) -> None:
    room.cluster.refuse("a")
    task = asyncio.create_task(room.serving.run())
    await until(lambda: ("b", "one") in room.passes)
    assert set(room.serving.problems) == {"a"}
    assert "InferenceService: is forbidden (HTTP 403)" in room.serving.problems["a"]
    assert (room.served("a"), room.served("b")) == (0.0, 1.0)
    assert set(room.watches) == {"b"}
    # Its Role comes back.
    del room.cluster.refused["a"]
    await until(lambda: ("a", "one") in room.passes)
    assert room.serving.problems == {}
    assert room.served("a") == 1.0
    task.cancel()


async def test_a_namespace_that_becomes_forbidden_is_dropped_and_the_others_go_on(
    room: Room,
) -> None:
    task = asyncio.create_task(room.serving.run())
    await until(lambda: len(room.queue.known()) == 2 and len(room.passes) >= 2)
    room.cluster.refuse("a")
    await until(lambda: set(room.serving.problems) == {"a"})
    assert room.queue.known() == [("b", "one")]
    assert not room.watches["b"].done()
    room.cluster.add_service("b", "two")
    await until(lambda: ("b", "two") in room.passes)
    assert room.num_watches == 2
    task.cancel()


async def test_a_watch_that_fails_for_lack_of_rights_ends_nothing(room: Room) -> None:
    task = asyncio.create_task(room.serving.run())
    await until(lambda: len(room.watches) == 2)
    room.cluster.refuse("a")
    room.watches["a"].set_exception(RuntimeError("403"))
    await until(lambda: set(room.serving.problems) == {"a"})
    assert not task.done()
    task.cancel()


async def test_another_failure_of_a_watch_ends_the_process(room: Room) -> None:
    task = asyncio.create_task(room.serving.run())
    await until(lambda: len(room.watches) == 2)
    room.watches["a"].set_exception(RuntimeError("a fault"))
    with pytest.raises(ExceptionGroup) as ended:
        async with asyncio.timeout(patience(10)):
            await task
    assert "a fault" in repr(ended.value.exceptions)


async def test_the_cluster_without_its_crds_is_told_and_served_when_they_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.01,))
    room = Room()
    room.cluster.add_service("a", "one")
    room.cluster.refuse(None, 404)
    task = asyncio.create_task(room.serving.run())
    await until(lambda: set(room.serving.problems) == {EVERYWHERE})
    del room.cluster.refused[None]
    await until(lambda: room.passes == [("a", "one")])
    assert room.serving.problems == {}
    task.cancel()
    await room.queue.close()


async def test_an_api_server_that_is_down_for_a_resync_drops_nothing(room: Room) -> None:
    task = asyncio.create_task(room.serving.run())
    await until(lambda: len(room.watches) == 2)
    calls = len(room.cluster.calls)
    room.cluster.refuse("a", 0)
    await until(lambda: len(room.cluster.calls) > calls + 3)
    assert room.serving.problems == {}
    assert not room.watches["a"].done()
    task.cancel()
