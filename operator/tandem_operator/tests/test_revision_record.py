"""A revision that served can be made again from its record when none of its workers is left."""

from typing import Any

import pytest

from tandem_operator.names.objects import CONTROLLER_REVISION
from tandem_operator.pair import Role
from tandem_operator.tests.facts import Fleet, make_spec
from tandem_operator.tests.test_operator_passes import KEY, Bench, condition


@pytest.fixture
def bench() -> Bench:
    return Bench()


def of_kind(bench: Bench, kind: str) -> list[dict[str, Any]]:
    return [body for key, body in bench.cluster.objects.items() if key[0] == kind]


def records(bench: Bench) -> list[dict[str, Any]]:
    return [
        body for (kind, _, _), body in bench.cluster.objects.items() if kind == CONTROLLER_REVISION
    ]


def pods(bench: Bench) -> list[dict[str, Any]]:
    return of_kind(bench, "Pod")


def token_secret(pod: dict[str, Any]) -> str:
    volume = next(v for v in pod["spec"]["volumes"] if v["name"] == "admin-token")
    name: str = volume["secret"]["secretName"]
    return name


def test_a_failing_roll_out_keeps_its_old_revision_without_any_pod() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    assert fleet.router is not None
    old = fleet.router.revision
    fleet.edit(make_spec(engine={"image": "broken:1"}))
    fleet.broken.add(str(fleet.step(start_pods=False).status["updatedRevision"]))  # type: ignore[index]
    # A node goes with every worker that served.
    fleet.pods.clear()
    for _ in range(5):
        fleet.step()
    assert fleet.router.revision == old
    ready = [pod for pod in fleet.pods.values() if pod.ready]
    assert {pod.revision for pod in ready} == {old}
    assert sorted(pod.role for pod in ready) == [Role.DECODE, Role.DECODE, Role.PREFILL]
    assert set(fleet.records) == {f"qwen-{old}"}, "a revision that never served has no record"
    fleet.edit(make_spec(engine={"image": "good:1"}))
    fleet.settle()
    assert fleet.router.revision != old
    assert set(fleet.records) == {f"qwen-{fleet.router.revision}"}, "nothing needs the old one"
    assert fleet.status.updated_revision is None


def test_a_revision_that_never_served_is_given_up_at_once() -> None:
    fleet = Fleet(make_spec())
    first = fleet.step(start_pods=False).status
    assert first is not None
    fleet.broken.add(str(first["revision"]))
    for _ in range(3):
        fleet.step()
    fleet.edit(make_spec(engine={"image": "good:1"}))
    fleet.settle()
    assert len(fleet.records) == 1
    assert {pod.revision for pod in fleet.pods.values()} == {fleet.status.revision}


async def test_workers_are_made_of_the_record(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    (record,) = records(bench)
    assert set(record["data"]) == {"prefill", "decode"}
    served = pods(bench)
    revision = served[0]["metadata"]["labels"]["tandem.dev/revision"]
    bench.service["spec"]["engine"] = {"image": "other:1"}
    bench.service["metadata"]["generation"] = 2
    for pod in served:
        del bench.cluster.objects[("Pod", "default", pod["metadata"]["name"])]
    await bench.controller.work(KEY)
    of_old = [p for p in pods(bench) if p["metadata"]["labels"]["tandem.dev/revision"] == revision]
    assert len(of_old) == 3
    assert {token_secret(pod) for pod in of_old} == {token_secret(record["data"]["decode"])}
    images = {pod["spec"]["containers"][0]["image"] for pod in of_old}
    assert images == {served[0]["spec"]["containers"][0]["image"]}
    names = {pod["metadata"]["name"] for pod in of_old}
    assert len(names) == 3
    assert not any("record" in name for name in names)
    await bench.settle()
    for name in names:  # they drain
        del bench.cluster.objects[("Pod", "default", name)]
    await bench.settle(2)
    assert condition(bench, "Ready")["status"] == "True"
    (now,) = records(bench)
    assert now["metadata"]["name"] != record["metadata"]["name"]


async def test_a_record_is_never_written_twice(bench: Bench) -> None:
    """A new process doesn't know the record yet, and what it would write may differ."""
    bench.put_service()
    await bench.settle()
    (record,) = records(bench)
    bench.children.drop(CONTROLLER_REVISION, "default", record["metadata"]["name"])
    bench.service["spec"]["rollout"] = {"drainSeconds": 7}
    bench.cluster.calls.clear()
    await bench.controller.work(KEY)
    assert ("apply", CONTROLLER_REVISION, record["metadata"]["name"]) not in bench.cluster.calls
    assert records(bench) == [record]
    bench.cluster.calls.clear()
    await bench.controller.work(KEY)
    assert CONTROLLER_REVISION not in {kind for _, kind, _ in bench.cluster.calls}
