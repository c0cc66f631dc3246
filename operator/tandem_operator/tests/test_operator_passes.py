"""Observe, reconcile and execute together, over the client's methods."""

import time
from typing import Any

import pytest

from tandem_operator.clients.admin_key import AdminKey
from tandem_operator.clients.children import Children
from tandem_operator.clients.workers import ProbeAnswer
from tandem_operator.controller import Controller
from tandem_operator.errors import ClusterError, ConflictError, NotOwnedError
from tandem_operator.execute.events import Events
from tandem_operator.execute.executor import Executor
from tandem_operator.facts.worker import WorkerState
from tandem_operator.observe.claims import ClaimReader
from tandem_operator.observe.observer import Observer
from tandem_operator.runtime.metrics import Metrics
from tandem_operator.tests.facts import IMAGES, OPERATOR
from tandem_operator.tests.memory_cluster import MemoryCluster

KEY = ("default", "qwen")


class QuietWorkers:
    """Workers that are idle and do what they are told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.tokens: set[str] = set()
        self.draining: set[str] = set()  # by address

    async def state(self, ip: str, port: int, seconds: float = 1.0) -> WorkerState | None:
        return WorkerState(0, 0, draining=ip in self.draining)

    async def metrics(self, ip: str, port: int) -> str | None:
        return ""

    async def admin(self, ip: str, port: int, action: str, token: str, body: Any) -> bool:
        self.calls.append(action)
        self.tokens.add(token)
        (self.draining.add if action == "drain" else self.draining.discard)(ip)
        return True

    async def probe(self, ip: str, port: int, token: str, body: Any) -> ProbeAnswer:
        self.calls.append("probe")
        return ProbeAnswer("tcp", 10**8, 0.1)


OWNED_BY_SERVICE = {
    "WorkerPool",
    "Deployment",
    "Service",
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "PodDisruptionBudget",
    "NetworkPolicy",
}


class Bench:
    def __init__(self) -> None:
        self.cluster = MemoryCluster()
        self.workers = QuietWorkers()
        self.metrics = Metrics()
        self.children = Children()
        events = Events(self.cluster, "me")  # type: ignore[arg-type]
        self.executor = Executor(self.cluster, self.workers, events, self.children)  # type: ignore[arg-type]
        claims = ClaimReader(self.cluster, OPERATOR, everywhere=True)  # type: ignore[arg-type]
        key = AdminKey(self.cluster, "system", "key")  # type: ignore[arg-type]
        observer = Observer(
            self.cluster,  # type: ignore[arg-type]
            self.workers,  # type: ignore[arg-type]
            IMAGES,
            claims,
            self.children,
            key,
            clock=self.clock,
        )
        self.controller = Controller(self.cluster, observer, self.executor, self.metrics)  # type: ignore[arg-type]

    @staticmethod
    def clock() -> float:
        """Looked up at each call, so that a test can make time pass."""
        return time.monotonic()

    def put_service(self, *, claimed: bool = True, **spec: Any) -> None:
        """A new service, which the operator has claimed; otherwise its first pass does that."""
        base = {
            "model": {"uri": "mock://fast"},
            "prefill": {"replicas": 1},
            "decode": {"replicas": 2},
            "kvTransfer": {"verify": {"minMegabytesPerSecond": 1}},
        }
        self.cluster.put(
            {
                "apiVersion": "tandem.dev/v1alpha1",
                "kind": "InferenceService",
                "metadata": {"name": "qwen", "namespace": "default", "generation": 1, "uid": "u"},
                "spec": {**base, **spec},
                "status": {"operator": OPERATOR} if claimed else {},
            }
        )

    @property
    def service(self) -> dict[str, Any]:
        return self.cluster.objects[("InferenceService", "default", "qwen")]

    def kubelet(self) -> None:
        for number, ((kind, _, _), body) in enumerate(self.cluster.objects.items()):
            if kind == "Pod" and "status" not in body:
                ready = {"type": "Ready", "status": "True"}
                body["status"] = {
                    "phase": "Running",
                    "podIP": f"10.0.0.{number}",
                    "conditions": [ready],
                    "containerStatuses": [{"name": "engine", "state": {"running": {}}}],
                }
            if kind == "Deployment":
                number = body["spec"]["replicas"]
                names = ("replicas", "updatedReplicas", "availableReplicas", "readyReplicas")
                body["status"] = dict.fromkeys(names, number)

    def kinds(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for kind, _, _ in self.cluster.objects:
            found[kind] = found.get(kind, 0) + 1
        return found

    async def settle(self, passes: int = 6) -> None:
        for _ in range(passes):
            await self.controller.work(KEY)
            self.kubelet()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def condition(bench: Bench, kind: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = bench.service["status"]["conditions"]
    return next(item for item in found if item["type"] == kind)


async def test_a_service_becomes_everything_that_serves_it(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    kinds = bench.kinds()
    assert kinds["Pod"] == 3
    assert kinds["WorkerPool"] == 2
    assert kinds["Deployment"] == 1
    assert kinds["Service"] == 2
    assert kinds["ServiceAccount"] == 2
    assert kinds["Role"] == kinds["RoleBinding"] == 1
    assert kinds["PodDisruptionBudget"] == 3
    assert kinds["NetworkPolicy"] == 2
    assert bench.service["status"]["operator"] == OPERATOR
    assert "finalizers" not in bench.service["metadata"]
    assert condition(bench, "Ready")["status"] == "True"
    assert bench.workers.calls == ["probe"]
    names = {name for kind, _, name in bench.cluster.objects if kind == "Pod"}
    moved = condition(bench, "TransportVerified")["message"]
    assert sum(name in moved for name in names) == 2, "the probe names both of its workers"
    assert kinds["Event"] >= 4


async def test_a_settled_service_costs_no_writes(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    bench.cluster.calls.clear()
    await bench.controller.work(KEY)
    assert {method for method, _, _ in bench.cluster.calls} <= {"get", "list"}


async def test_what_is_not_ours_is_not_touched(bench: Bench) -> None:
    foreign = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "qwen", "namespace": "default"},
        "spec": {"selector": {"app": "theirs"}},
    }
    bench.cluster.put(foreign)
    bench.put_service()
    with pytest.raises(NotOwnedError):
        await bench.controller.work(KEY)
    assert bench.cluster.objects[("Service", "default", "qwen")]["spec"] == foreign["spec"]
    with pytest.raises(NotOwnedError):
        await bench.controller.work(KEY)
    degraded = condition(bench, "Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "StepFailed")
    assert "remove or rename" in degraded["message"]


async def test_children_of_a_deleted_predecessor_are_replaced(bench: Bench) -> None:
    owner = {"kind": "InferenceService", "name": "qwen", "uid": "old"}
    bench.cluster.put(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "qwen", "namespace": "default", "ownerReferences": [owner]},
        }
    )
    bench.put_service()
    await bench.settle(2)
    service = bench.cluster.objects[("Service", "default", "qwen")]
    assert service["metadata"]["ownerReferences"][0]["uid"] == "u"


def pods_of(bench: Bench) -> dict[str, str]:
    return {
        name: body["metadata"]["uid"]
        for (kind, _, name), body in bench.cluster.objects.items()
        if kind == "Pod"
    }


def cut_loose(bench: Bench, owner: str) -> None:
    """What Kubernetes does with `--cascade=orphan`: the owner goes, what it owned stays."""
    for body in bench.cluster.objects.values():
        meta = body["metadata"]
        meta["ownerReferences"] = [
            item for item in meta.get("ownerReferences", []) if item["uid"] != owner
        ]


async def test_orphaned_workers_go_on_and_a_new_service_adopts_them(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    pods = pods_of(bench)
    bench.service["metadata"]["deletionTimestamp"] = "2026-11-22T12:00:00Z"
    bench.service["metadata"]["finalizers"] = ["orphan"]
    bench.workers.calls.clear()
    await bench.settle(3)
    assert bench.service["metadata"]["finalizers"] == ["orphan"]
    assert bench.workers.calls == [], "nothing drains"
    del bench.cluster.objects[("InferenceService", "default", "qwen")]
    cut_loose(bench, "u")
    await bench.settle(2)
    assert pods_of(bench) == pods
    bench.put_service()
    bench.service["metadata"]["uid"] = "second"
    await bench.settle()
    assert pods_of(bench) == pods
    assert condition(bench, "Ready")["status"] == "True"
    children = [
        body for (kind, _, _), body in bench.cluster.objects.items() if kind in OWNED_BY_SERVICE
    ]
    assert {body["kind"] for body in children} == OWNED_BY_SERVICE
    for body in children:
        assert [owner["uid"] for owner in body["metadata"]["ownerReferences"]] == ["second"]


async def test_workers_of_an_orphaned_pool_get_the_new_pool_as_their_owner(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    pods = pods_of(bench)
    pool = bench.cluster.objects.pop(("WorkerPool", "default", "qwen-decode"))
    cut_loose(bench, pool["metadata"]["uid"])
    bench.children.drop("WorkerPool", "default", "qwen-decode")
    await bench.settle()
    assert pods_of(bench) == pods
    new = bench.cluster.objects[("WorkerPool", "default", "qwen-decode")]["metadata"]["uid"]
    assert new != pool["metadata"]["uid"]
    owners = {
        body["metadata"]["ownerReferences"][0]["uid"]
        for (kind, _, name), body in bench.cluster.objects.items()
        if kind == "Pod" and "decode" in name
    }
    assert owners == {new}


async def test_orphans_of_another_service_are_not_adopted(bench: Bench) -> None:
    labels = {
        "app.kubernetes.io/managed-by": "tandem-operator",
        "tandem.dev/service": "other",
    }
    meta = {"name": "qwen", "namespace": "default", "labels": labels}
    bench.cluster.put({"apiVersion": "v1", "kind": "Service", "metadata": meta})
    bench.put_service()
    with pytest.raises(NotOwnedError):
        await bench.controller.work(KEY)


async def test_a_crash_leaves_its_log_in_status(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    name, pod = next((n, b) for (k, _, n), b in bench.cluster.objects.items() if k == "Pod")
    ended = {"exitCode": 1, "reason": "Error", "finishedAt": "2026-11-22T12:30:00Z"}
    pod["status"] = {
        "phase": "Failed",
        "containerStatuses": [{"name": "engine", "state": {"terminated": ended}}],
    }
    await bench.settle()
    failure = bench.service["status"]["failures"][0]
    assert (failure["pod"], failure["log"]) == (name, "last words")
    assert ("Pod", "default", name) not in bench.cluster.objects
    assert bench.kinds()["Pod"] == 3


async def test_an_engine_that_ends_beside_a_sidecar_is_replaced(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    name, pod = next((n, b) for (k, _, n), b in bench.cluster.objects.items() if k == "Pod")
    ended = {"exitCode": 1, "reason": "Error", "finishedAt": "2026-11-22T12:30:00Z"}
    pod["status"] = {
        "phase": "Running",
        "containerStatuses": [
            {"name": "engine", "state": {"terminated": ended}},
            {"name": "proxy", "state": {"running": {}}},
        ],
    }
    await bench.controller.work(KEY)
    assert (condition(bench, "Degraded")["reason"]) == "WorkersFailing"
    await bench.settle()
    assert bench.service["status"]["failures"][0]["pod"] == name
    assert ("Pod", "default", name) not in bench.cluster.objects
    assert bench.kinds()["Pod"] == 3


async def test_a_sidecar_that_ends_is_told(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    pod = next(b for (k, _, _), b in bench.cluster.objects.items() if k == "Pod")
    proxy = {"name": "proxy", "state": {"terminated": {"exitCode": 1, "reason": "Error"}}}
    pod["status"]["containerStatuses"].append(proxy)
    pod["status"]["conditions"][0]["status"] = "False"
    await bench.controller.work(KEY)
    degraded = condition(bench, "Degraded")
    assert degraded["reason"] == "SidecarEnded"
    assert pod["metadata"]["name"] in degraded["message"]


async def test_scale_in_calls_the_worker_before_it_deletes(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    bench.cluster.objects[("WorkerPool", "default", "qwen-decode")]["spec"]["replicas"] = 1
    await bench.settle(2)
    assert bench.workers.calls[-1] == "drain"
    marked = [
        body
        for (kind, _, _), body in bench.cluster.objects.items()
        if kind == "Pod" and "tandem.dev/draining" in body["metadata"]["annotations"]
    ]
    assert len(marked) == 1
    marked[0]["metadata"]["annotations"]["tandem.dev/draining"] = "2026-11-22T00:00:00Z"
    await bench.settle(2)
    assert bench.kinds()["Pod"] == 2


async def test_the_status_is_written_even_when_a_step_failed(bench: Bench) -> None:
    bench.put_service()
    bench.cluster.fail["apply"] = ClusterError(403, "forbidden")
    with pytest.raises(ClusterError):
        await bench.controller.work(KEY)
    assert condition(bench, "Ready")["status"] == "False"


async def test_a_scale_write_between_look_and_apply_is_not_lost(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    pool = bench.cluster.objects[("WorkerPool", "default", "qwen-decode")]
    seen = dict(pool["metadata"])
    pool["metadata"]["resourceVersion"] = "later"
    with pytest.raises(ConflictError):
        await bench.cluster.apply({**pool, "metadata": seen})


async def test_the_finalizer_of_an_earlier_version_goes(bench: Bench) -> None:
    bench.put_service()
    bench.service["metadata"]["finalizers"] = ["theirs", "tandem.dev/finalizer"]
    await bench.settle(2)
    assert bench.service["metadata"]["finalizers"] == ["theirs"]


async def test_a_service_that_is_gone_is_forgotten(bench: Bench) -> None:
    assert await bench.controller.work(KEY) is None


async def test_nodes_that_may_not_be_read_are_unknown(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put_service(rdma={"mode": "DevicePlugin"})

    async def forbidden(kind: str, *args: Any) -> list[dict[str, Any]]:
        if kind == "Node":
            raise ClusterError(403, "forbidden")
        return await MemoryCluster.list(bench.cluster, kind, *args)

    monkeypatch.setattr(bench.cluster, "list", forbidden)
    await bench.settle()
    # Nodes that offer nothing would be a missing fabric; nodes that nobody could read are not.
    assert condition(bench, "CapacityUnavailable")["reason"] != "FabricUnavailable"
