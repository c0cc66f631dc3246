"""Two operators over one cluster, and what a service that is gone leaves."""

from typing import Any

import pytest

from tandem_operator.clients.admin_key import AdminKey
from tandem_operator.clients.children import Children
from tandem_operator.controller import Controller
from tandem_operator.errors import ConflictError
from tandem_operator.execute.events import Events
from tandem_operator.execute.executor import Executor
from tandem_operator.facts.observed import Images
from tandem_operator.observe.claims import ClaimReader
from tandem_operator.observe.observer import Observer
from tandem_operator.runtime.metrics import Metrics
from tandem_operator.tests.test_operator_passes import KEY, Bench
from tandem_operator.tests.test_scaling_passes import policy_object

FIRST, SECOND = "tandem-system/tandem-operator", "second/tandem-operator"


class Rival:
    """A second operator, of another release, over the same cluster."""

    def __init__(self, bench: Bench) -> None:
        cluster: Any = bench.cluster
        workers: Any = bench.workers
        self.metrics = Metrics()
        claims = ClaimReader(cluster, SECOND, everywhere=True)
        children = Children()
        key = AdminKey(cluster, "second", "key")
        images = Images("router:2", "engine:2")
        observer = Observer(cluster, workers, images, claims, children, key)
        executor = Executor(cluster, workers, Events(cluster, SECOND), children)
        self.controller = Controller(cluster, observer, executor, self.metrics)


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    lease = {"name": "tandem-operator", "namespace": "tandem-system"}
    spec = {"holderIdentity": "op-1", "renewTime": "1"}
    made.cluster.put({"kind": "Lease", "metadata": lease, "spec": spec})
    return made


def pods(bench: Bench) -> set[str]:
    return {name for kind, _, name in bench.cluster.objects if kind == "Pod"}


def events(bench: Bench, reason: str) -> list[dict[str, Any]]:
    found = bench.cluster.objects.items()
    return [b for (k, _, _), b in found if k == "Event" and b["reason"] == reason]


async def test_the_second_operator_leaves_a_service_alone_and_says_whose_it_is(
    bench: Bench,
) -> None:
    bench.put_service()
    await bench.settle()
    rival, before = Rival(bench), pods(bench)
    bench.cluster.calls.clear()
    for _ in range(3):
        assert await rival.controller.work(KEY)
    assert {method for method, _, _ in bench.cluster.calls} == {"get", "create"}
    assert pods(bench) == before
    assert bench.service["status"]["operator"] == FIRST
    (told,) = events(bench, "ServedByOther")
    assert (told["type"], FIRST in told["note"], SECOND in told["note"]) == ("Warning", True, True)
    name = "tandem_operator_service_served"
    labels = {"namespace": "default", "service": "qwen"}
    assert rival.metrics.registry.get_sample_value(name, labels) == 0.0
    assert bench.metrics.registry.get_sample_value(name, labels) == 1.0


async def test_a_service_is_claimed_before_anything_is_made(bench: Bench) -> None:
    bench.put_service(claimed=False)
    await bench.controller.work(KEY)
    assert bench.service["status"] == {"operator": FIRST}
    assert bench.kinds() == {"Lease": 1, "InferenceService": 1}


async def test_of_two_claims_one_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put_service(claimed=False)
    rival, merge = Rival(bench), bench.cluster.merge

    async def late(*args: Any, **more: Any) -> dict[str, Any]:
        monkeypatch.setattr(bench.cluster, "merge", merge)
        await rival.controller.work(KEY)  # between the first one's look and its claim
        return await merge(*args, **more)

    monkeypatch.setattr(bench.cluster, "merge", late)
    with pytest.raises(ConflictError):
        await bench.controller.work(KEY)
    assert bench.service["status"]["operator"] == SECOND


async def test_the_second_takes_over_when_the_first_is_gone(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    rival = Rival(bench)
    del bench.cluster.objects[("Lease", "tandem-system", "tandem-operator")]
    await rival.controller.work(KEY)
    assert bench.service["status"]["operator"] == SECOND
    assert bench.service["status"]["conditions"], "the rest of the status stays"


async def test_a_service_that_is_gone_leaves_its_policy(bench: Bench) -> None:
    bench.cluster.put(policy_object())
    bench.put_service(autoscaling={"policyName": "chat"})
    await bench.settle()
    policy = bench.cluster.objects[("AutoscalingPolicy", "default", "chat")]
    assert [target["name"] for target in policy["status"]["targets"]] == ["qwen"]
    del bench.cluster.objects[("InferenceService", "default", "qwen")]
    # Another service writes the policy in between: the write is refused, and the pass repeated.
    merge = bench.cluster.merge

    async def changed(*args: Any, **more: Any) -> dict[str, Any]:
        bench.cluster.merge = merge  # type: ignore[method-assign]
        bench.cluster.put(policy)
        return await merge(*args, **more)

    bench.cluster.merge = changed  # type: ignore[method-assign]
    with pytest.raises(ConflictError):
        await bench.controller.work(KEY)
    assert await bench.controller.work(KEY) is None
    assert policy["status"]["targets"] == []
