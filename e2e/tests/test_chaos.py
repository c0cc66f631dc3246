"""Kill each part in turn while 100 streams run: the tokens are those of an undisturbed run.

The mock worker checks at every step that its KV pages hold exactly the KV of its tokens, so a lost,
stale or foreign page shows as an error, not as a plausible answer.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
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
    """100 requests with different prompts and lengths; every other one samples with a seed."""
    return [
        completion(
            model,
            f"request {i}: " + "lorem ipsum " * (i % 17),
            60 + i % 40,
            **({"temperature": 0.8, "seed": i} if i % 2 else {}),
        )
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
        assert not running.done(), "the streams were over before the disturbance"
        return await running

    return asyncio.run(scenario())


def kill_pod(service: Service, name: str) -> None:
    """SIGKILL the first process of every container of a pod."""
    pids = service.cluster.container_pids(service.namespace, name)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def assert_same(streams: list[Stream], expected: list[Stream]) -> None:
    assert [s.error for s in streams if s.error] == []
    wrong = [
        i for i, (s, e) in enumerate(zip(streams, expected, strict=True)) if s.tokens != e.tokens
    ]
    assert wrong == []
    print(f"longest gap {max(s.longest_gap for s in streams):.2f} s")


def assert_recovered(service: Service) -> None:
    """Every pod is back, and once the streams are over no block is owned, leased or leaked."""
    service.wait_ready(120)
    for role in ("prefill", "decode", "router"):
        service.wait_pool(role, 2)
    wait_for("the workers are idle", lambda: all(map(is_idle, worker_states(service))), 60)
    leaks = service.leaked_blocks()
    assert len(leaks) == 4
    assert set(leaks.values()) == {0}


def worker_states(service: Service) -> list[dict[str, Any]]:
    return [service.worker_state(p) for role in ("prefill", "decode") for p in service.pods(role)]


def is_idle(state: dict[str, Any]) -> bool:
    ledger = state["ledger"]
    return not state["running"] and state["leases"] == ledger["owned"] == ledger["leased"] == 0


def num_restarts(service: Service, name: str) -> int:
    """How often the kubelet has restarted the pod's containers."""
    statuses = service.get("pod", name)["status"]["containerStatuses"]
    return sum(status["restartCount"] for status in statuses)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_is_killed(chaos: Service, undisturbed: list[Stream], role: str) -> None:
    chaos.wait_pool(role, 2)
    victim = chaos.pod_names(role)[0]
    streams = run_while(chaos, lambda: kill_pod(chaos, victim))
    assert_same(streams, undisturbed)
    assert_recovered(chaos)
    assert victim not in chaos.pod_names(role)
    if role == "decode":
        assert sum(stream.failovers for stream in streams) > 0

    def evidence() -> dict[str, Any] | None:
        failures = chaos.get()["status"].get("failures", [])
        return next((f for f in failures if f["pod"] == victim), None)

    failure = wait_for("the crash is in status.failures", evidence, 60)
    assert failure["exitCode"] == 137
    assert failure["log"]


def test_a_router_is_killed(chaos: Service, undisturbed: list[Stream]) -> None:
    """A client's own connection dies with its router, so only here may clients retry."""
    victim = chaos.pod_names("router")[0]
    before = num_restarts(chaos, victim)
    streams = run_while(chaos, lambda: kill_pod(chaos, victim), retries=20)
    assert sum(stream.retries for stream in streams) > 0
    assert_same(streams, undisturbed)
    assert_recovered(chaos)
    assert num_restarts(chaos, victim) > before


def test_the_operator_is_killed(chaos: Service, undisturbed: list[Stream]) -> None:
    operator = Service(chaos.cluster, "operator", "tandem-system")
    names = [
        name.removeprefix("pod/") for name in operator.kubectl("get", "pods", "-o", "name").split()
    ]
    before = {name: num_restarts(operator, name) for name in names}

    def kill() -> None:
        for name in names:
            kill_pod(operator, name)

    def is_back(name: str) -> bool:
        restarted = num_restarts(operator, name) > before[name]
        return restarted and is_ready(operator.get("pod", name))

    assert_same(run_while(chaos, kill), undisturbed)
    for name in names:
        wait_for(
            f"{name} is back",
            partial(is_back, name),
            240,  # the kubelet's back-off counts the deaths in other tests too
        )
    assert_recovered(chaos)


@pytest.mark.parametrize("component", ["kubelet", "kube-apiserver"])
def test_a_cluster_component_is_killed(
    chaos: Service, undisturbed: list[Stream], component: str
) -> None:
    dead: list[int] = []
    streams = run_while(chaos, lambda: dead.append(chaos.cluster.kill(component, "node-0")))
    assert_same(streams, undisturbed)

    def is_back() -> bool:
        found = chaos.cluster.status().components
        pids = [c.pid for c in found if (c.name, c.node) == (component, "node-0")]
        answers = chaos.cluster.kubectl("get", "nodes", check=False).returncode == 0
        return answers and None not in pids and pids != dead

    wait_for(f"{component} is back", is_back, 120)
    assert_recovered(chaos)
