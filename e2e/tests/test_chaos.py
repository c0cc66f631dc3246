"""Kill each part in turn while 100 streams run: the tokens are those of an undisturbed run.

The mock worker checks at every step that its KV pages hold exactly the KV of its tokens, so a lost,
stale or foreign page shows as an error, not as a plausible answer.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.service import Service, is_ready, mock_manifest
from tests.streams import Stream, completion, run_streams
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NUM_STREAMS = 100


@pytest.fixture(scope="module")
def chaos(tandem: Any) -> Iterator[Service]:
    manifest = mock_manifest(
        "chaos",
        prefill=2,
        decode=2,
        profile="tiny?decode_ms=30&prefill_ms=20",
        router={"replicas": 2},
    )
    service = Service.apply(tandem, manifest)
    service.wait_ready(240)
    yield service
    service.delete()


def bodies(model: str) -> list[dict[str, Any]]:
    """100 requests of different prompts and lengths."""
    return [
        completion(model, f"request {i}: " + "lorem ipsum " * (i % 17), 60 + i % 40)
        for i in range(NUM_STREAMS)
    ]


@pytest.fixture(scope="module")
def undisturbed(chaos: Service) -> list[Stream]:
    streams = asyncio.run(run_streams(chaos.url, bodies(chaos.name)))
    assert [s.error for s in streams if s.error] == []
    return streams


def run_while(service: Service, disturb: Callable[[], None], retries: int = 0) -> list[Stream]:
    """The 100 streams, started over 3 s; `disturb` runs in a thread once a third has started."""

    async def scenario() -> list[Stream]:
        running = asyncio.create_task(
            run_streams(service.url, bodies(service.name), retries, spread=0.03)
        )
        await asyncio.sleep(1.0)
        await asyncio.to_thread(disturb)
        return await running

    return asyncio.run(scenario())


def kill_pod(service: Service, role: str) -> Callable[[], None]:
    """SIGKILL the first process of the role's first pod."""

    def kill() -> None:
        pod = service.pod_names(role)[0]
        for pid in service.cluster.container_pids(service.namespace, pod):
            os.kill(pid, signal.SIGKILL)

    return kill


def assert_same(streams: list[Stream], expected: list[Stream]) -> None:
    assert [s.error for s in streams if s.error] == []
    wrong = [
        i for i, (s, e) in enumerate(zip(streams, expected, strict=True)) if s.tokens != e.tokens
    ]
    assert wrong == []


def assert_recovered(service: Service) -> None:
    """Every pod is back and no block has leaked."""
    service.wait_ready(120)
    for role, count in (("prefill", 2), ("decode", 2), ("router", 2)):
        wait_for(
            f"{count} {role} pods are ready",
            lambda role=role, count=count: sum(map(is_ready, service.pods(role))) == count,
            120,
        )
    leaks = service.leaked_blocks()
    assert len(leaks) == 4
    assert set(leaks.values()) == {0}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_is_killed(chaos: Service, undisturbed: list[Stream], role: str) -> None:
    victim = chaos.pod_names(role)[0]
    streams = run_while(chaos, kill_pod(chaos, role))
    assert_same(streams, undisturbed)
    assert_recovered(chaos)

    def evidence() -> dict[str, Any] | None:
        failures = chaos.get()["status"].get("failures", [])
        return next((f for f in failures if f["pod"] == victim), None)

    failure = wait_for("the crash is in status.failures", evidence, 60)
    assert failure["exitCode"] == 137


def test_a_router_is_killed(chaos: Service, undisturbed: list[Stream]) -> None:
    """The client's own connection dies with a router, so here alone clients may retry."""
    streams = run_while(chaos, kill_pod(chaos, "router"), retries=20)
    assert_same(streams, undisturbed)
    assert_recovered(chaos)


def test_the_operator_is_killed(chaos: Service, undisturbed: list[Stream]) -> None:
    operator = Service(chaos.cluster, "operator", "tandem-system")

    def kill() -> None:
        for name in operator.kubectl("get", "pods", "-o", "name").split():
            for pid in chaos.cluster.container_pids("tandem-system", name.removeprefix("pod/")):
                os.kill(pid, signal.SIGKILL)

    assert_same(run_while(chaos, kill), undisturbed)
    assert_recovered(chaos)


@pytest.mark.parametrize("component", ["kubelet", "kube-apiserver"])
def test_a_cluster_component_is_killed(
    chaos: Service, undisturbed: list[Stream], component: str
) -> None:
    node = "node-0" if component == "kubelet" else None
    streams = run_while(chaos, lambda: chaos.cluster.kill(component, node))
    assert_same(streams, undisturbed)
    wait_for(
        "the API server answers",
        lambda: chaos.cluster.kubectl("get", "nodes", check=False).returncode == 0,
        60,
    )
    assert_recovered(chaos)
