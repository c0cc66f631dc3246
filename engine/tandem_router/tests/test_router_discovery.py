"""Workers found by list and watch; nothing the API server does makes them vanish."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tandem_router.discovery import pods as pods_module
from tandem_router.discovery.pods import PodDiscovery, own_namespace, wire_port
from tandem_router.discovery.source import Discovery, OnWorkers, parse_address
from tandem_router.router import build_discovery
from tandem_router.tests.fake_api_server import FakeApiServer, pod
from tandem_router.tests.fake_worker import FakeWorker
from tandem_router.tests.harness import BASE, Running, router, until
from tandem_router.workers.link import WorkerAddress


@dataclass
class Seen:
    api: FakeApiServer
    workers: dict[str, WorkerAddress] = field(default_factory=dict)

    def take(self, workers: Sequence[WorkerAddress]) -> None:
        self.workers = {worker.name: worker for worker in workers}


@contextlib.asynccontextmanager
async def watching() -> AsyncIterator[Seen]:
    api = await FakeApiServer().start()
    seen = Seen(api)
    api.put(pod("d0"))
    task = asyncio.create_task(PodDiscovery("svc", "ns", api=api.api()).run(seen.take))
    try:
        await until(lambda: api.num_watches == 1)
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await api.stop()


async def test_pods_come_change_and_go() -> None:
    async with watching() as seen:
        assert set(seen.workers) == {"d0"}
        seen.api.put(pod("p0", role="prefill", ip="10.0.0.9", port=9999))
        await until(lambda: "p0" in seen.workers)
        assert (seen.workers["p0"].host, seen.workers["p0"].port) == ("10.0.0.9", 9999)
        seen.api.put(pod("r0", role="router"))
        seen.api.put(pod("d1", ip=""))
        seen.api.put(pod("d2", phase="Failed"))
        seen.api.put(pod("p0", role="prefill", draining="true"))
        await until(lambda: seen.workers["p0"].marked_draining)
        assert set(seen.workers) == {"d0", "p0"}
        seen.api.put(pod("d0", deleted=True))
        await until(lambda: seen.workers["d0"].marked_draining)
        seen.api.put(pod("p0", role="prefill", draining="false"))
        await until(lambda: not seen.workers["p0"].marked_draining)
        seen.api.delete("d0")
        await until(lambda: set(seen.workers) == {"p0"})
        assert seen.api.selectors == {"tandem.dev/service=svc"}


async def test_revisions_of_one_model_share_a_router() -> None:
    api = await FakeApiServer().start()
    seen = Seen(api)
    for name, revision, model in (("d0", "old", "m"), ("d1", "new", "m"), ("d2", "new", "other")):
        entry = pod(name)
        entry["metadata"]["labels"]["tandem.dev/revision"] = revision
        entry["metadata"].setdefault("annotations", {})["tandem.dev/model-id"] = model
        api.put(entry)
    api.put(pod("d3"))
    discovery = PodDiscovery("svc", "ns", model_id="m", api=api.api())
    task = asyncio.create_task(discovery.run(seen.take))
    try:
        await until(lambda: api.num_watches == 1)
        assert set(seen.workers) == {"d0", "d1"}
        named = pod("d3")
        named["metadata"].setdefault("annotations", {})["tandem.dev/model-id"] = "m"
        api.put(named)
        await until(lambda: set(seen.workers) == {"d0", "d1", "d3"})
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await api.stop()


async def test_a_watch_that_ends_is_taken_up_again() -> None:
    async with watching() as seen:
        seen.api.send({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "77"}}})
        seen.api.close_watches()
        await until(lambda: seen.api.num_watches == 2)
        seen.api.put(pod("d1"))
        await until(lambda: "d1" in seen.workers)
        assert seen.api.num_lists == 1


async def test_expired_versions_are_listed_anew() -> None:
    async with watching() as seen:
        seen.api.pods["d9"] = pod("d9")
        seen.api.send({"type": "ERROR", "object": {"code": 410, "message": "too old"}})
        await until(lambda: "d9" in seen.workers and seen.api.num_watches == 2)
        seen.api.send({"type": "ERROR", "object": {"code": 500, "message": "oh"}})
        await until(lambda: seen.api.num_lists >= 3 and seen.api.num_watches == 3)
        seen.api.fail_with = 410
        seen.api.close_watches()
        await until(lambda: seen.api.num_refused > 2)
        seen.api.fail_with = None
        seen.api.put(pod("d8"))
        await until(lambda: "d8" in seen.workers)


async def test_a_server_that_is_away_leaves_the_workers() -> None:
    async with watching() as seen:
        await seen.api.stop()
        with pytest.raises(AssertionError):
            await until(lambda: not seen.workers, seconds=0.3)
        seen.api.put(pod("d1"))
        await seen.api.start()
        await until(lambda: set(seen.workers) == {"d0", "d1"})
        seen.api.fail_with = 403
        seen.api.close_watches()
        with pytest.raises(AssertionError):
            await until(lambda: not seen.workers, seconds=0.3)
        seen.api.fail_with = None
        seen.api.put(pod("d2"))
        await until(lambda: "d2" in seen.workers)


async def test_a_fleet_follows_the_pods() -> None:
    api = await FakeApiServer().start()
    first, second = await FakeWorker("a").start(), await FakeWorker("b").start()
    api.put(pod("a", port=first.port))
    async with router_with(api) as running:
        fleet = running.context.fleet
        await until(fleet.has_decode_worker)
        body = {"model": "mock", "prompt": "x", "max_tokens": 3}
        assert (await running.post("/v1/completions", **body)).status_code == 200
        api.put(pod("b", port=second.port))
        await until(lambda: sum(link.is_connected for link in fleet.links) == 2)
        api.put(pod("a", port=first.port, draining="true"))
        await until(lambda: any(link.is_draining for link in fleet.links))
        assert (await running.post("/v1/completions", **body)).status_code == 200
        assert len(second.submits) == 1
        # A pod that leaves keeps its running streams until they end.
        second.hold_after = 1
        stream = asyncio.create_task(running.events("/v1/completions", **body))
        await until(lambda: len(second.submits) == 2)
        api.delete("b")
        await until(lambda: all(link.is_draining for link in fleet.links))
        assert {link.worker_id for link in fleet.links} == {"a", "b"}
        await second.die()
        await until(lambda: {link.address.name for link in fleet.links} == {"a"})
        api.put(pod("a", port=first.port, uid="u2"))
        assert len(await stream) == 3
    await first.die()
    await api.stop()


async def test_another_worker_at_a_pods_address_is_not_taken_for_it() -> None:
    api = await FakeApiServer().start()
    other = await FakeWorker("other").start()
    api.put(pod("a", port=other.port))
    async with router_with(api) as running:
        fleet = running.context.fleet
        await until(lambda: any("another worker answers" in link.trouble for link in fleet.links))
        assert not fleet.has_decode_worker()
        other.name = "a"
        await until(fleet.has_decode_worker)
    await other.die()
    await api.stop()


def router_with(api: FakeApiServer) -> AbstractAsyncContextManager[Running]:
    return router(wait=False, discovery=PodDiscovery("svc", "ns", api=api.api()))


class ListedLater(Discovery):
    """Lists nothing until `listed` is set, then `addresses`."""

    def __init__(self, *addresses: WorkerAddress) -> None:
        self.listed = asyncio.Event()
        self.addresses = addresses

    async def run(self, on_workers: OnWorkers) -> None:
        await self.listed.wait()
        on_workers(self.addresses)
        await asyncio.Event().wait()


async def ready(running: Running) -> bool:
    return (await running.http.get("/ready")).status_code == 200


async def inflight(running: Running, number: int) -> bool:
    text = (await running.monitor.get("/metrics")).text
    return f'tandem_inflight{{model="mock"}} {number}.0' in text


async def test_a_router_without_workers_is_an_endpoint_that_refuses() -> None:
    """Who takes it out of the Service leaves clients of a service at zero without an answer."""
    source = ListedLater()
    async with router(discovery=source, service="svc", queue_seconds=0.3) as running:
        assert not await ready(running), "it doesn't know its workers yet"
        source.listed.set()
        await until(lambda: running.context.fleet.is_surveyed)
        assert await ready(running)
        waiting = asyncio.create_task(
            running.post("/v1/completions", model="mock", prompt="x", n=2)
        )
        while not await inflight(running, 2):
            assert not waiting.done(), "a request that waits for a first worker is in flight"
        answer = await waiting
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        text = (await running.monitor.get("/metrics")).text
        assert 'tandem_requests_total{class="default",code="503",model="mock"} 1.0' in text
        assert 'tandem_inflight{model="mock"} 0.0' in text


async def test_waiting_for_a_first_worker_leaves_the_router_to_others() -> None:
    """A change of the fleet at the moment when the waiting begins must not make it spin."""
    async with router(discovery=ListedLater(), service="svc", queue_seconds=60) as running:
        fleet, dispatcher = running.context.fleet, running.context.dispatcher

        async def wait_for_worker() -> str:
            fleet.update([])
            return (await dispatcher.model_facts()).model

        waiting = asyncio.create_task(wait_for_worker())
        assert await ready(running)
        assert not waiting.done(), "the router answered others only when the waiting one gave up"
        worker = await FakeWorker().start()
        host, _, port = worker.address.rpartition(":")
        fleet.update([WorkerAddress("d0", host, int(port))])
        assert await waiting == "mock"
        await worker.die()


async def test_a_router_is_ready_once_it_has_dialled_what_is_listed() -> None:
    worker = await FakeWorker().start()
    host, _, port = worker.address.rpartition(":")
    here, away = WorkerAddress("d0", host, int(port)), WorkerAddress("d1", "127.0.0.1", 1)
    source = ListedLater(here, away)
    async with router(discovery=source, service="svc", wait=False) as running:
        source.listed.set()
        await until(lambda: running.context.fleet.is_surveyed)
        assert await ready(running)
        assert running.context.fleet.has_decode_worker()
        await worker.die()
        await until(lambda: not running.context.fleet.has_decode_worker())
        assert await ready(running)


def test_ports_and_addresses() -> None:
    assert wire_port({}) == 8101
    assert wire_port({"tandem.dev/wire-port": "7"}) == 7
    assert parse_address("[::1]:80") == WorkerAddress("[::1]:80", "::1", 80)
    for bad in ("host", "host:", ":80", "host:x", "host:99999"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            parse_address(bad)


def test_the_namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pods_module, "_NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.delenv("POD_NAMESPACE", raising=False)
    assert own_namespace() == "default"
    (tmp_path / "namespace").write_text("mine\n")
    assert own_namespace() == "mine"
    assert isinstance(build_discovery(replace(BASE, service="svc")), PodDiscovery)
