"""Why something is not ready reaches the conditions and the events, whoever it happens to."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest

from tandem_operator.api import InferenceServiceStatus
from tandem_operator.api.conditions import Condition, ConditionType, condition_of
from tandem_operator.errors import ClusterError, RefusedFieldError
from tandem_operator.facts.observed import RouterTrouble
from tandem_operator.manifests.revision import revision_of
from tandem_operator.pair import Role
from tandem_operator.plan import reconcile
from tandem_operator.tests.facts import IMAGES, Fleet, make_spec
from tandem_operator.tests.memory_cluster import MemoryCluster
from tandem_operator.tests.test_operator_passes import KEY, Bench, condition


@pytest.fixture
def bench() -> Bench:
    return Bench()


QUOTA = 'pods "qwen-decode-a" is forbidden: exceeded quota: gpus, requested: 1, used: 0, limited: 0'
PULL = "container engine: ErrImagePull: manifest unknown"


def judged(status: InferenceServiceStatus, kind: ConditionType) -> Condition:
    found = condition_of(status.conditions, kind)
    assert found is not None
    return found


def refuse_pods(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def create(body: dict[str, Any]) -> dict[str, Any]:
        if body["kind"] == "Pod":
            raise ClusterError(403, QUOTA)
        return await MemoryCluster.create(bench.cluster, body)

    monkeypatch.setattr(bench.cluster, "create", create)


def events(bench: Bench) -> dict[str, str]:
    found = (body for (kind, _, _), body in bench.cluster.objects.items() if kind == "Event")
    return {event["reason"]: event["note"] for event in found}


async def test_an_exhausted_quota_is_the_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put_service()
    await bench.controller.work(KEY)
    refuse_pods(bench, monkeypatch)
    for _ in range(2):
        with pytest.raises(ClusterError):
            await bench.controller.work(KEY)
    for kind in ("Degraded", "CapacityUnavailable", "DecodeReady", "PrefillReady"):
        said = condition(bench, kind)
        assert said["reason"] == "QuotaExceeded", kind
        assert "exceeded quota: gpus" in said["message"]
    assert "exceeded quota: gpus" in condition(bench, "Progressing")["message"]
    told = events(bench)
    assert "exceeded quota" in told["CreateRefused"]
    assert "Created" not in told


async def test_a_failed_worker_stays_until_its_replacement_is_there(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put_service()
    await bench.settle()
    name, pod = next((n, b) for (k, _, n), b in bench.cluster.objects.items() if k == "Pod")
    ended = {"exitCode": 1, "reason": "Error", "finishedAt": "2026-11-22T12:30:00Z"}
    pod["status"] = {
        "phase": "Failed",
        "containerStatuses": [{"name": "engine", "state": {"terminated": ended}}],
    }
    refuse_pods(bench, monkeypatch)
    with pytest.raises(ClusterError):
        await bench.controller.work(KEY)
    assert ("Pod", "default", name) in bench.cluster.objects
    assert "Replacing" not in events(bench)


async def test_a_volume_that_cannot_be_mounted_is_told(bench: Bench) -> None:
    bench.put_service()
    for _ in range(2):
        await bench.controller.work(KEY)
    for (kind, _, name), body in bench.cluster.objects.items():
        if kind == "Pod":
            waiting = {"waiting": {"reason": "ContainerCreating"}}
            body["status"] = {"containerStatuses": [{"name": "engine", "state": waiting}]}
            note = 'MountVolume.SetUp failed for volume "models"'
            bench.cluster.warnings[name] = {"reason": "FailedMount", "note": note}
    await bench.controller.work(KEY)
    said = condition(bench, "DecodeReady")
    assert said["reason"] == "FailedMount"
    assert 'volume "models"' in said["message"]


async def test_events_that_may_not_be_read_are_no_error(bench: Bench) -> None:
    bench.put_service()
    for _ in range(2):
        await bench.controller.work(KEY)
    for (kind, _, _), body in bench.cluster.objects.items():
        if kind == "Pod":
            waiting = {"waiting": {"reason": "ContainerCreating"}}
            body["status"] = {"containerStatuses": [{"name": "engine", "state": waiting}]}
    bench.cluster.fail["last_warning"] = ClusterError(403, "forbidden")
    await bench.controller.work(KEY)
    assert condition(bench, "DecodeReady")["reason"] == "WorkersStarting"


async def test_a_router_that_cannot_start_is_the_reason(bench: Bench) -> None:
    bench.put_service()
    await bench.settle()
    message = 'secret "keys" not found'
    state = {"waiting": {"reason": "CreateContainerConfigError", "message": message}}
    bench.cluster.put(
        {
            "kind": "Pod",
            "metadata": {
                "name": "qwen-router-x",
                "namespace": "default",
                "labels": {"tandem.dev/service": "qwen", "tandem.dev/role": "router"},
            },
            "status": {"containerStatuses": [{"name": "router", "state": state}]},
        }
    )
    bench.cluster.objects[("Deployment", "default", "qwen-router")]["status"]["readyReplicas"] = 0
    await bench.controller.work(KEY)
    for kind in ("RouterReady", "Degraded"):
        said = condition(bench, kind)
        assert said["reason"] == "CreateContainerConfigError"
        assert message in said["message"]
        assert "qwen-router-x" in said["message"]


def test_a_roll_out_that_takes_too_long_names_the_cause() -> None:
    fields = {"rollout": {"drainSeconds": 60, "progressDeadlineSeconds": 60}}
    fleet = Fleet(make_spec(**fields))
    fleet.settle()
    fleet.edit(make_spec(engine={"image": "typo:1"}, **fields))
    target = revision_of(fleet.spec, IMAGES)
    fleet.broken.add(target)
    for _ in range(90):
        for name, pod in fleet.pods.items():
            if pod.revision == target:
                fleet.pods[name] = replace(pod, trouble=PULL, trouble_reason="ErrImagePull")
        fleet.step()
    said = judged(fleet.status, ConditionType.PROGRESSING)
    assert said.reason == "ProgressDeadlineExceeded"
    assert PULL in said.message
    assert judged(fleet.status, ConditionType.DEGRADED).reason == "ErrImagePull"
    assert judged(fleet.status, ConditionType.READY).status == "True", "the old revision serves"


def test_routers_that_hold_up_a_roll_out_are_its_cause() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    fleet.edit(make_spec(engine={"image": "engine:2"}))
    fleet.step()
    trouble = RouterTrouble("qwen-router-x", "ErrImagePull", "container router: ErrImagePull: no")
    plan = reconcile(replace(fleet.observe(), router_troubles=(trouble,)), fleet.now)
    status = InferenceServiceStatus.model_validate(plan.status)
    assert "qwen-router-x: container router" in judged(status, ConditionType.PROGRESSING).message


def test_a_worker_that_does_not_exist_has_no_node() -> None:
    fleet = Fleet(make_spec())
    fleet.step(start_pods=False)
    assert judged(fleet.status, ConditionType.CAPACITY_UNAVAILABLE).reason != "CapacityFound"
    fleet.settle()
    assert judged(fleet.status, ConditionType.CAPACITY_UNAVAILABLE).reason == "CapacityFound"
    assert fleet.count(Role.DECODE) == 2


UNKNOWN_IN_POD = (
    400,
    'Pod in version "v1" cannot be handled as a Pod: strict decoding error: unknown field'
    ' "spec.tolerationz"',
)
UNKNOWN_IN_TEMPLATE = (
    500,
    "failed to create typed patch object (default/qwen-router; apps/v1, Kind=Deployment):"
    " .spec.template.spec.tolerationz: field not declared in schema",
)


@pytest.mark.parametrize(
    ("part", "method", "refused", "answer", "conditions"),
    [
        ("decode", "create", "Pod", UNKNOWN_IN_POD, ("Degraded", "DecodeReady")),
        ("router", "apply", "Deployment", UNKNOWN_IN_TEMPLATE, ("Degraded", "RouterReady")),
    ],
)
async def test_a_field_that_the_api_server_refuses_is_named(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    method: str,
    refused: str,
    answer: tuple[int, str],
    conditions: tuple[str, ...],
) -> None:
    spec: dict[str, Any] = {part: {"podTemplate": {"spec": {"tolerationz": []}}}}
    bench.put_service(**spec)

    async def refuse(body: dict[str, Any], *rest: Any) -> dict[str, Any]:
        role = body["metadata"].get("labels", {}).get("tandem.dev/role")
        if body["kind"] == refused and role == part:
            raise ClusterError(*answer)
        made: dict[str, Any] = await getattr(MemoryCluster, method)(bench.cluster, body, *rest)
        return made

    monkeypatch.setattr(bench.cluster, method, refuse)
    for _ in range(3):
        with contextlib.suppress(RefusedFieldError):
            await bench.controller.work(KEY)
    for kind in conditions:
        said = condition(bench, kind)
        assert said["reason"] == "FieldRefused", kind
        assert f"spec.{part}.podTemplate.spec.tolerationz" in said["message"]
        assert "correct or remove it" in said["message"]
