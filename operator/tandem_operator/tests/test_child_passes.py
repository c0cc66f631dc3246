"""What happens to children: nothing at rest, repair after drift, removal when not wanted."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tandem_operator.clients.children import CHILD_KINDS, OPTIONAL_KINDS, Children
from tandem_operator.clients.cluster import KINDS
from tandem_operator.errors import ClusterError
from tandem_operator.names.objects import CONTROLLER_REVISION, INFERENCE_SERVICE, SCALE_HOLDER
from tandem_operator.names.worker import RDMA_TRANSPORTS
from tandem_operator.runtime.serving import resync
from tandem_operator.runtime.workqueue import WorkQueue
from tandem_operator.tests.memory_cluster import MemoryCluster
from tandem_operator.tests.test_operator_passes import KEY, Bench, condition

READS = {"get", "list", "last_warning", "pod_log"}
# rdma.mode Auto looks at what nodes offer when workers could use it.
OTHERS = {"Pod", *(("Node", "ResourceSlice", "DeviceClass") if RDMA_TRANSPORTS else ())}
NUM_PASSES = 12


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes so many seconds pass."""
    real, passed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + passed[0])

    def wait(seconds: float) -> None:
        passed[0] += seconds

    return wait


def children_of(bench: Bench) -> dict[tuple[str, str], dict[str, Any]]:
    """Every object with the service's label that the operator may list, by kind and name."""
    return {
        (kind, name): body
        for (kind, _, name), body in bench.cluster.objects.items()
        if "tandem.dev/service" in body["metadata"].get("labels", {})
        and kind not in ("Pod", "Secret")
    }


def see(bench: Bench, kind: str, body: dict[str, Any]) -> None:
    """The watch tells of a change that somebody made by hand."""
    bench.children.put(kind, bench.cluster.put(body))


async def test_at_rest_nothing_is_written(bench: Bench, later: Callable[[float], None]) -> None:
    bench.put_service()
    await bench.settle()
    bench.cluster.calls.clear()
    for _ in range(NUM_PASSES):
        later(61.0)
        await bench.controller.work(KEY)
    calls = Counter((method, kind) for method, kind, _ in bench.cluster.calls)
    num_reads = sum(number for (method, _), number in calls.items() if method in READS)
    num_writes = calls.total() - num_reads
    print(f"{NUM_PASSES} passes at rest: {num_writes} writes, {num_reads} reads")
    assert num_writes == 0, calls
    assert {kind for _, kind in calls} == {INFERENCE_SERVICE, "WorkerPool", "Deployment", *OTHERS}


REPAIRED = [kind for kind in CHILD_KINDS if kind not in ("WorkerPool", CONTROLLER_REVISION)]
"""Pools are compared field by field, and a record can't be changed."""


@pytest.mark.parametrize("kind", REPAIRED)
async def test_drift_is_undone_in_the_next_pass(bench: Bench, kind: str) -> None:
    bench.put_service()
    await bench.settle()
    (_, name), body = next(item for item in children_of(bench).items() if item[0][0] == kind)
    owners = body["metadata"]["ownerReferences"]
    changed = {**body, "metadata": {**body["metadata"], "ownerReferences": [*owners, {"uid": "x"}]}}
    see(bench, kind, changed)
    bench.cluster.calls.clear()
    await bench.controller.work(KEY)
    assert ("apply", kind, name) in bench.cluster.calls
    assert children_of(bench)[(kind, name)]["metadata"]["ownerReferences"] == owners
    bench.cluster.calls.clear()
    await bench.controller.work(KEY)
    assert {method for method, _, _ in bench.cluster.calls} <= READS


@pytest.mark.parametrize("seen", [True, False])
async def test_a_child_deleted_by_hand_comes_back(bench: Bench, seen: bool) -> None:
    bench.put_service()
    await bench.settle()
    gone = bench.cluster.objects.pop(("Service", "default", "qwen"))
    if seen:
        version = int(gone["metadata"]["resourceVersion"])
        bench.children.drop("Service", "default", "qwen", version)
    else:
        # No watch was open when it was deleted: the next full list shows it.
        queue = WorkQueue(bench.controller.work)
        await resync(bench.cluster, queue, bench.children, None)  # type: ignore[arg-type]
        await queue.close()
    await bench.controller.work(KEY)
    assert ("Service", "default", "qwen") in bench.cluster.objects


async def test_nothing_is_kept_about_children_that_are_gone(bench: Bench) -> None:
    for _ in range(2):
        bench.put_service()
        await bench.settle()
        writer = bench.executor._writer
        assert {kind for kind, _, _ in writer._applied} >= {
            "Service",
            "ServiceAccount",
            "Deployment",
        }
        assert len(writer._created) == 1
        # The service is deleted, and the garbage collector takes what it owned.
        for (kind, name), body in children_of(bench).items():
            bench.children.drop(kind, "default", name, int(body["metadata"]["resourceVersion"]))
        bench.cluster.objects.clear()
        await bench.controller.work(KEY)
        assert not writer._applied
        assert not writer._created


@pytest.mark.parametrize("status", [403, 404])
async def test_a_cluster_that_serves_no_claims_is_resynced(
    bench: Bench, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put_service()
    await bench.settle()

    async def fail(kind: str, *args: Any) -> list[dict[str, Any]]:
        if kind in OPTIONAL_KINDS:
            raise ClusterError(status, "not served")
        return await MemoryCluster.list(bench.cluster, kind, *args)

    monkeypatch.setattr(bench.cluster, "list", fail)
    queue = WorkQueue(bench.controller.work)
    assert await resync(bench.cluster, queue, bench.children, None) == 1  # type: ignore[arg-type]
    await queue.close()


async def test_every_kind_of_child_goes_when_it_is_not_wanted(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    made = children_of(bench)
    kinds = {kind for kind, _ in made}
    assert kinds == set(CHILD_KINDS), "every kind that is written is watched and can be removed"
    for kind in sorted(kinds):
        # As if an earlier spec, or an earlier release, had asked for one more of this kind.
        like = next(body for (other, _), body in made.items() if other == kind)
        extra = {**like, "metadata": {**like["metadata"], "name": "qwen-extra"}}
        extra["metadata"].pop("uid")
        see(bench, kind, extra)
    theirs = {**extra, "metadata": {**extra["metadata"], "name": "theirs", "ownerReferences": []}}
    see(bench, kind, theirs)
    assert len(children_of(bench)) == len(made) + len(kinds) + 1
    await bench.controller.work(KEY)
    left = children_of(bench)
    assert left.keys() - made.keys() == {(kind, "theirs")}, "what others own stays"
    assert made.keys() <= left.keys()


async def test_policies_that_are_switched_off_go_and_come_back(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    assert bench.kinds()["NetworkPolicy"] == 2
    bench.service["spec"]["networkPolicy"] = {"enabled": False}
    await bench.controller.work(KEY)
    assert "NetworkPolicy" not in bench.kinds()
    bench.service["spec"]["networkPolicy"] = {"enabled": True}
    await bench.controller.work(KEY)
    assert bench.kinds()["NetworkPolicy"] == 2


def routers(bench: Bench) -> dict[str, Any]:
    return bench.cluster.objects[("Deployment", "default", "qwen-router")]


async def test_a_scaler_keeps_the_number_of_routers(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    assert routers(bench)["spec"]["replicas"] == 2, "the number that the docs promise"
    owners = {entry["manager"] for entry in routers(bench)["metadata"]["managedFields"]}
    assert SCALE_HOLDER in owners
    routers(bench)["spec"]["replicas"] = 5
    see(bench, "Deployment", routers(bench))
    await bench.settle()
    bench.service["spec"]["rollout"] = {"drainSeconds": 7}
    await bench.settle()
    assert routers(bench)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 37
    assert routers(bench)["spec"]["replicas"] == 5
    assert condition(bench, "RouterReady")["message"] == "5 of 5 routers are ready"


async def test_the_spec_rules_when_it_says_how_many_routers(bench: Bench) -> None:
    bench.put_service(router={"replicas": 3})
    await bench.settle()
    routers(bench)["spec"]["replicas"] = 5
    see(bench, "Deployment", routers(bench))
    await bench.settle()
    assert routers(bench)["spec"]["replicas"] == 3
    bench.service["spec"]["router"] = {}
    await bench.settle()
    assert routers(bench)["spec"]["replicas"] == 3, "leaving the number to a scaler changes nothing"
    routers(bench)["spec"]["replicas"] = 4
    see(bench, "Deployment", routers(bench))
    await bench.settle()
    assert routers(bench)["spec"]["replicas"] == 4


async def test_no_routers_is_not_ready(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    routers(bench)["spec"]["replicas"] = 0
    await bench.settle()
    said = condition(bench, "RouterReady")
    assert (said["status"], said["reason"]) == ("False", "ScaledToZero")


def test_an_older_state_does_not_hide_a_newer_one() -> None:
    children = Children()

    def state(version: int, value: str) -> dict[str, Any]:
        meta = {"name": "x", "namespace": "n", "resourceVersion": str(version), "labels": {}}
        return {"metadata": meta, "spec": {"a": value}}

    assert children.put("Service", state(5, "new"))
    new = children.content("Service", "n", "x")
    assert not children.put("Service", state(4, "old"))
    children.drop("Service", "n", "x", 4)
    assert children.content("Service", "n", "x") == new
    before = children.versions("Service", "n")
    children.put("Service", state(6, "newest"))
    children.replace("Service", before, [])
    assert children.content("Service", "n", "x"), "written after the list was asked for"
    children.replace("Service", children.versions("Service", None), [])
    assert not children.content("Service", "n", "x")
    assert set(CHILD_KINDS) <= set(KINDS)
