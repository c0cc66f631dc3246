"""Only a pod with the test label lets its worker inject faults, and the service says so."""

from typing import Any

import pytest

from tandem_operator.api.conditions import ConditionType
from tandem_operator.api.rdma import RdmaMode
from tandem_operator.facts.observed import PoolView
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.manifests.worker import Blueprint, build_worker_pod
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.service import reconcile
from tandem_operator.tests.facts import NOW, make_observed, make_pod, make_spec

LABEL = "tandem.dev/fault-injection"
POOL = PoolView("qwen-decode", "uid-pool", 1, 1, 1)


def build(*, labelled: bool, **changes: Any) -> dict[str, Any]:
    metadata = {"labels": {LABEL: "true"}} if labelled else {}
    pool = {"replicas": 1, "podTemplate": {"metadata": metadata, **changes.pop("template", {})}}
    spec = make_spec(prefill=pool, decode=pool, **changes)
    worker = Blueprint(Role.DECODE, "qwen-decode-abc", "r1", Wiring(RdmaMode.NONE))
    return build_worker_pod(make_observed(spec, pools=Pair(None, POOL)), spec, worker)


def env(pod: dict[str, Any]) -> dict[str, Any]:
    return {item["name"]: item for item in pod["spec"]["containers"][0]["env"]}


def test_the_worker_reads_the_label_of_its_pod() -> None:
    pod = build(labelled=True, engine={"env": [{"name": "TANDEM_FAULTS", "value": "fence:drop"}]})
    assert pod["metadata"]["labels"][LABEL] == "true"
    assert env(pod)["TANDEM_FAULTS"]["value"] == "fence:drop"
    path = env(pod)["TANDEM_FAULTS_ALLOWED"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == f"metadata.labels['{LABEL}']"


@pytest.mark.parametrize("labelled", [True, False])
def test_a_template_can_not_say_it_in_the_labels_place(labelled: bool) -> None:
    forged = [{"name": "TANDEM_FAULTS_ALLOWED", "value": "true"}]
    template = {"spec": {"containers": [{"name": "engine", "env": forged}]}}
    pod = build(labelled=labelled, template=template)
    entries = pod["spec"]["containers"][0]["env"]
    written = [each for each in entries if each["name"] == "TANDEM_FAULTS_ALLOWED"]
    assert [each.get("value") for each in written] == ([None] if labelled else [])


def test_no_other_pod_knows_of_it() -> None:
    assert "TANDEM_FAULTS_ALLOWED" not in env(build(labelled=False))


@pytest.mark.parametrize(("value", "is_said"), [("true", True), ("false", False)])
def test_the_service_says_that_its_workers_may_fail_on_purpose(value: str, is_said: bool) -> None:
    spec = make_spec()
    manifest = {"metadata": {"labels": {LABEL: value}}}
    plan = reconcile(make_observed(spec, pods=(make_pod(manifest=manifest),)), NOW)
    assert plan.status is not None
    conditions = {item["type"]: item for item in plan.status["conditions"]}
    degraded = conditions[ConditionType.DEGRADED]
    told = "qwen-decode-a may inject faults into hand-offs: remove the label"
    assert (degraded["reason"] == "FaultInjection") == is_said, degraded
    assert (told in degraded["message"]) == is_said
