"""The admin token over whole passes: a Secret before the pods, and calls with what is in it."""

import base64
from typing import Any

import pytest

from tandem_operator.clients.admin_key import AdminKey
from tandem_operator.clients.children import CHILD_KINDS
from tandem_operator.controller import Controller
from tandem_operator.observe.claims import ClaimReader
from tandem_operator.observe.observer import Observer
from tandem_operator.tests.facts import IMAGES, OPERATOR
from tandem_operator.tests.test_operator_passes import KEY, Bench


@pytest.fixture
def bench() -> Bench:
    return Bench()


def restart(bench: Bench) -> None:
    """Another process of the operator, which remembers nothing."""
    key = AdminKey(bench.cluster, "system", "key")  # type: ignore[arg-type]
    claims = ClaimReader(bench.cluster, OPERATOR, everywhere=True)  # type: ignore[arg-type]
    observer = Observer(bench.cluster, bench.workers, IMAGES, claims, bench.children, key)  # type: ignore[arg-type]
    bench.controller = Controller(bench.cluster, observer, bench.executor, bench.metrics)  # type: ignore[arg-type]


def secrets_of(bench: Bench) -> list[dict[str, Any]]:
    """The Secrets in the service's namespace."""
    objects = bench.cluster.objects.items()
    return [body for (kind, space, _), body in objects if (kind, space) == ("Secret", "default")]


def pods(bench: Bench) -> list[dict[str, Any]]:
    return [body for (kind, _, _), body in bench.cluster.objects.items() if kind == "Pod"]


def set_decode(bench: Bench, replicas: int) -> None:
    bench.cluster.objects[("WorkerPool", "default", "qwen-decode")]["spec"]["replicas"] = replicas


async def test_the_token_is_in_one_secret_that_is_written_before_any_pod(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    (secret,) = secrets_of(bench)
    assert secret["immutable"] is True
    account = bench.cluster.objects["ServiceAccount", "default", "qwen-worker"]
    (owner,) = secret["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("ServiceAccount", account["metadata"]["uid"])
    created = [kind for method, kind, _ in bench.cluster.calls if method == "create"]
    assert created.index("Secret") < created.index("Pod")
    mounted = {
        volume["secret"]["secretName"]
        for pod in pods(bench)
        for volume in pod["spec"]["volumes"]
        if "secret" in volume
    }
    assert mounted == {secret["metadata"]["name"]}
    token = base64.b64decode(secret["data"]["token"]).decode()
    for (kind, _, _), body in bench.cluster.objects.items():
        assert kind == "Secret" or token not in str(body), kind
    # Of Secrets, only the operator's own key is read; the others are just made.
    touched = {(method, name) for method, kind, name in bench.cluster.calls if kind == "Secret"}
    name = secret["metadata"]["name"]
    assert touched == {("get", "key"), ("create", "key"), ("create", name)}


async def test_a_restarted_operator_knows_the_token(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    restart(bench)
    set_decode(bench, 1)
    await bench.settle(2)
    (secret,) = secrets_of(bench)
    assert bench.workers.calls[-1] == "drain"
    assert bench.workers.tokens == {base64.b64decode(secret["data"]["token"]).decode()}


async def test_a_deleted_secret_is_made_again_before_the_next_pod(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    (secret,) = secrets_of(bench)
    del bench.cluster.objects[("Secret", "default", secret["metadata"]["name"])]
    set_decode(bench, 3)
    await bench.settle(1)
    (again,) = secrets_of(bench)
    assert again["data"] == secret["data"]


@pytest.mark.parametrize("reason", ["FailedMount", "FailedScheduling"])
async def test_a_deleted_secret_is_made_again_for_a_pod_that_waits_for_it(
    bench: Bench, reason: str
) -> None:
    bench.put_service()
    await bench.controller.work(KEY)
    await bench.controller.work(KEY)
    (secret,) = secrets_of(bench)
    del bench.cluster.objects[("Secret", "default", secret["metadata"]["name"])]
    waiting = {"waiting": {"reason": "ContainerCreating"}}
    for pod in pods(bench):
        pod["status"] = {"containerStatuses": [{"name": "engine", "state": waiting}]}
        name = pod["metadata"]["name"]
        bench.cluster.warnings[name] = {"reason": reason, "note": "it waits"}
    await bench.controller.work(KEY)
    found = [each["data"] for each in secrets_of(bench)]
    assert found == ([secret["data"]] if reason == "FailedMount" else [])


async def test_the_secret_goes_with_a_service_that_was_orphaned_and_adopted(bench: Bench) -> None:
    """The garbage collector takes what has no living owner; orphaning takes the service out of
    the owners of its children, not of what belongs to those."""
    bench.put_service()
    await bench.settle()
    del bench.cluster.objects["InferenceService", "default", "qwen"]
    for body in bench.cluster.objects.values():
        owners = body["metadata"].get("ownerReferences", [])
        kept = [owner for owner in owners if owner["uid"] != "u"]
        if kept != owners:
            body["metadata"]["ownerReferences"] = kept
            if body["kind"] in CHILD_KINDS:
                bench.children.put(body["kind"], bench.cluster.put(body))
    bench.put_service()
    bench.service["metadata"]["uid"] = "again"
    await bench.settle()
    accounts = {
        body["metadata"]["uid"]: body["metadata"]["ownerReferences"][0]["uid"]
        for (kind, _, _), body in bench.cluster.objects.items()
        if kind == "ServiceAccount"
    }
    (secret,) = secrets_of(bench)
    (owner,) = secret["metadata"]["ownerReferences"]
    assert accounts[owner["uid"]] == "again"


async def test_the_account_made_again_gets_a_secret_of_its_own(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    (secret,) = secrets_of(bench)
    gone = bench.cluster.objects.pop(("ServiceAccount", "default", "qwen-worker"))
    del bench.cluster.objects["Secret", "default", secret["metadata"]["name"]]  # collected with it
    version = int(gone["metadata"]["resourceVersion"])
    bench.children.drop("ServiceAccount", "default", "qwen-worker", version)
    await bench.controller.work(KEY)
    (again,) = secrets_of(bench)
    account = bench.cluster.objects["ServiceAccount", "default", "qwen-worker"]
    assert again["metadata"]["ownerReferences"][0]["uid"] == account["metadata"]["uid"]


async def test_workers_of_a_lost_key_are_drained_without_a_call(bench: Bench) -> None:
    """SIGTERM makes them drain; new ones mount the Secret of the new key."""
    bench.put_service()
    await bench.settle()
    del bench.cluster.objects[("Secret", "system", "key")]
    restart(bench)
    before = len(bench.workers.calls)
    set_decode(bench, 1)
    await bench.settle(2)
    (marked,) = (p for p in pods(bench) if "tandem.dev/draining" in p["metadata"]["annotations"])
    marked["metadata"]["annotations"]["tandem.dev/draining"] = "2026-11-22T00:00:00Z"
    await bench.settle(2)
    assert len(pods(bench)) == 2
    assert len(bench.workers.calls) == before, "their token is not known"
    set_decode(bench, 2)
    await bench.settle(2)
    names = {
        volume["secret"]["secretName"]
        for pod in pods(bench)
        for volume in pod["spec"]["volumes"]
        if "secret" in volume
    }
    assert names == {secret["metadata"]["name"] for secret in secrets_of(bench)}
    assert len(names) == 2


async def test_a_worker_that_somebody_drained_works_again(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    pod = pods(bench)[-1]
    bench.workers.draining.add(pod["status"]["podIP"])
    # The kubelet sees that it isn't ready, and only such workers are asked.
    pod["status"]["conditions"][0]["status"] = "False"
    await bench.controller.work(KEY)
    assert bench.workers.calls[-1] == "undrain"
    assert not bench.workers.draining
    events = [b for (kind, _, _), b in bench.cluster.objects.items() if kind == "Event"]
    (event,) = (event for event in events if event["reason"] == "DrainUndone")
    assert event["type"] == "Warning"
    assert pod["metadata"]["name"] in event["note"]
