"""Passes while things are going: the namespace, the service, the pool."""

from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from tandem_operator.errors import MissingError, NamespaceEndsError
from tandem_operator.execute.executor import Executor
from tandem_operator.facts.observed import Observed
from tandem_operator.plan import Plan
from tandem_operator.tests.test_operator_passes import KEY, Bench, cut_loose

TIME = "2026-11-22T12:00:00Z"
POOL = ("WorkerPool", "default", "qwen-decode")


@pytest.fixture
def bench() -> Bench:
    return Bench()


def owners_of_pods(bench: Bench) -> set[str]:
    return {
        owner["uid"]
        for (kind, _, name), body in bench.cluster.objects.items()
        if kind == "Pod" and "decode" in name
        for owner in body["metadata"]["ownerReferences"]
    }


def between(bench: Bench, monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Let something happen after the next pass has observed and before it executes."""
    real = Executor.execute

    async def execute(self: Executor, plan: Plan, observed: Observed) -> Any:
        monkeypatch.setattr(Executor, "execute", real)
        happens()
        return await self.execute(plan, observed)

    monkeypatch.setattr(Executor, "execute", execute)


@pytest.mark.parametrize("method", ["create", "apply"])
async def test_nothing_more_is_made_in_a_namespace_that_is_being_deleted(
    bench: Bench, method: str
) -> None:
    bench.put_service()
    if method == "create":
        await bench.settle()
        gone = next(key for key in bench.cluster.objects if key[0] == "Pod")
        del bench.cluster.objects[gone]
    bench.cluster.fail[method] = NamespaceEndsError(403, "namespace default is being terminated")
    with capture_logs() as logs:
        await bench.controller.work(KEY)
        bench.cluster.calls.clear()
        for _ in range(3):
            await bench.controller.work(KEY)
    tried = {called for called, _, _ in bench.cluster.calls}
    assert not tried & {"create", "apply", "merge", "delete"}
    told = [entry for entry in logs if entry["log_level"] in ("warning", "error")]
    assert [entry["because"] for entry in told] == ["namespace default is being terminated"]
    # The namespace is gone, and a new one has a service of this name.
    bench.cluster.fail.clear()
    bench.service["metadata"]["uid"] = "new"
    bench.cluster.calls.clear()
    await bench.controller.work(KEY)
    assert "apply" in {called for called, _, _ in bench.cluster.calls}


async def test_workers_are_not_given_to_a_pool_that_is_going(bench: Bench) -> None:
    """It is gone a moment later, and the garbage collector takes what it owns then."""
    bench.put_service()
    await bench.settle()
    pool = bench.cluster.objects[POOL]["metadata"]
    pool["deletionTimestamp"], pool["finalizers"] = TIME, ["orphan"]
    cut_loose(bench, pool["uid"])
    for _ in range(2):
        await bench.controller.work(KEY)
    assert owners_of_pods(bench) == set()


@pytest.mark.parametrize("is_gone", [False, True])
async def test_workers_are_not_given_to_a_pool_that_went_in_the_middle_of_a_pass(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, is_gone: bool
) -> None:
    bench.put_service()
    await bench.settle()
    pool = bench.cluster.objects[POOL]["metadata"]
    cut_loose(bench, pool["uid"])

    def go() -> None:
        pool["deletionTimestamp"] = TIME
        if is_gone:
            del bench.cluster.objects[POOL]

    between(bench, monkeypatch, go)
    await bench.controller.work(KEY)
    assert owners_of_pods(bench) == set()


async def test_children_are_not_taken_back_by_a_service_that_is_going(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put_service()
    await bench.settle()

    def orphan() -> None:
        bench.service["metadata"]["deletionTimestamp"] = TIME
        cut_loose(bench, "u")
        body = bench.cluster.objects["Service", "default", "qwen-worker"]
        bench.children.put("Service", bench.cluster.put(body))

    between(bench, monkeypatch, orphan)
    with pytest.raises(MissingError, match="is being deleted"):
        await bench.controller.work(KEY)
    body = bench.cluster.objects["Service", "default", "qwen-worker"]
    assert body["metadata"]["ownerReferences"] == []
    await bench.controller.work(KEY)
    assert body["metadata"]["ownerReferences"] == []
