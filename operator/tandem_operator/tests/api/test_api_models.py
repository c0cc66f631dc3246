"""The models: defaults as documented, refusals, frozen objects, round trips."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tandem_operator.api import (
    AutoscalingPolicySpec,
    InferenceServiceSpec,
    InferenceServiceStatus,
    WorkerPoolSpec,
    WorkerPoolStatus,
)
from tandem_operator.api.api_object import ApiObject
from tandem_operator.api.conditions import Condition
from tandem_operator.api.kv_transfer import TransferBackend, VerifyMode
from tandem_operator.api.pool import RoleChangeMode
from tandem_operator.api.ratio import RatioMode
from tandem_operator.api.rdma import RdmaMode
from tandem_operator.api.refusal import find_refused
from tandem_operator.api.router import RouterPolicy
from tandem_operator.api.slo import Slo

ROOT = Path(__file__).resolve().parents[4]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def service(**spec: Any) -> InferenceServiceSpec:
    least: dict[str, Any] = {"model": {"uri": "hf://org/name"}, "prefill": {}, "decode": {}}
    return InferenceServiceSpec.model_validate(least | spec)


def test_defaults() -> None:
    spec = service()
    assert spec.prefill.replicas == spec.decode.replicas == 1
    assert spec.prefill.max_batched_tokens == 8192
    assert spec.prefill.gpus_per_pod == 0
    assert spec.engine.page_size == 64
    assert spec.ratio.mode is RatioMode.FREE
    assert spec.role_change.mode is RoleChangeMode.NONE
    assert spec.kv_transfer.backend is TransferBackend.AUTO
    assert spec.kv_transfer.bootstrap_port == 8998
    assert spec.kv_transfer.verify.mode is VerifyMode.REQUIRED
    assert spec.kv_transfer.verify.min_megabytes_per_second == 500
    assert spec.rdma.mode is RdmaMode.AUTO
    assert spec.rdma.resource is None
    assert spec.router.replicas is None
    assert spec.router.policy is RouterPolicy.KV_AWARE
    assert spec.router.service.port == 8000
    assert [c.name for c in spec.slo.classes] == ["interactive", "batch"]
    assert spec.autoscaling is None
    assert (spec.rollout.max_surge, spec.rollout.max_unavailable) == ("25%", 0)
    assert spec.rollout.drain_seconds == 600
    assert spec.network_policy.enabled
    assert spec.revision_history_limit == 5


def test_policy_defaults() -> None:
    policy = AutoscalingPolicySpec.model_validate({})
    assert policy.mode == "Active"
    assert policy.objectives.ttft_milliseconds is None
    assert policy.objectives.attainment_percent == 99
    assert policy.signals.stale_seconds == 30
    assert policy.pools.decode.kv_ceiling_percent == 85
    assert policy.coordination.gpu_budget == 0
    assert not policy.scale_to_zero.enabled


def test_pool_defaults() -> None:
    assert WorkerPoolSpec.model_validate({"serviceName": "a", "role": "Decode"}).replicas == 1
    assert WorkerPoolStatus().conditions == ()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_parse_and_come_back(path: Path) -> None:
    models: dict[str, type[ApiObject]] = {
        "InferenceService": InferenceServiceSpec,
        "AutoscalingPolicy": AutoscalingPolicySpec,
    }
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents
    for document in documents:
        assert document["apiVersion"] == "tandem.dev/v1alpha1"
        model = models[document["kind"]]
        spec = model.model_validate(document["spec"])
        assert model.model_validate(spec.to_manifest()) == spec
        assert list(find_refused(spec)) == []
    # kubeconform -strict takes no merge keys, and anchors are of little use without them.
    tokens = yaml.scan(path.read_text(), Loader=yaml.SafeLoader)
    assert not any(isinstance(token, yaml.AnchorToken | yaml.AliasToken) for token in tokens)


def test_the_full_example_uses_every_field_of_the_spec() -> None:
    document = yaml.safe_load((ROOT / "examples/full.yaml").read_text())
    fields = {field.alias for field in InferenceServiceSpec.model_fields.values()}
    assert set(document["spec"]) == fields


@pytest.mark.parametrize(
    ("where", "spec"),
    [
        ("model", {"model": {}}),
        ("model.url", {"model": {"uri": "hf://a/b", "url": "x"}}),
        ("decode.replicas", {"decode": {"replicas": -1}}),
        ("decode.replicas", {"decode": {"replicas": 1.5}}),
        ("decode.replica", {"decode": {"replica": 1}}),
        ("prefill.resources.limits", {"prefill": {"resources": {"limits": {"memory": "much"}}}}),
        ("prefill.podTemplate.nodeSelector", {"prefill": {"podTemplate": {"nodeSelector": {}}}}),
        ("engine.options.turbo", {"engine": {"options": {"turbo": 1}}}),
        ("kvTransfer.backend", {"kvTransfer": {"backend": "nixl"}}),
        ("kvTransfer.bootstrapPort", {"kvTransfer": {"bootstrapPort": 0}}),
        ("rdma.resource.count", {"rdma": {"resource": {"count": "All"}}}),
        ("rdma.resource.name", {"rdma": {"resource": {"name": "ib"}}}),
        ("ratio.fixed.prefill", {"ratio": {"fixed": {"prefill": 0, "decode": 1}}}),
        ("slo.classes", {"slo": {"classes": []}}),
        ("router.replicas", {"router": {"replicas": 0}}),
        ("rollout.maxSurge", {"rollout": {"maxSurge": "120%"}}),
        ("rollout.maxSurge", {"rollout": {"maxSurge": -1}}),
        ("autoscaling.policy", {"autoscaling": {"policy": "chat"}}),
    ],
)
def test_refusals(where: str, spec: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refusal:
        service(**spec)
    locations = {".".join(map(str, error["loc"])) for error in refusal.value.errors()}
    assert any(location.startswith(where) for location in locations), locations


def test_objects_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        service().prefill.replicas = 3  # type: ignore[misc]


def test_pod_templates_take_any_pod_field() -> None:
    template = {
        "metadata": {"labels": {"team": "search"}},
        "spec": {
            "nodeSelector": {"gpu": "h100"},
            "volumes": [{"name": "v", "emptyDir": {"medium": "Memory"}}],
        },
    }
    spec = service(prefill={"podTemplate": template})
    written = spec.prefill.pod_template.to_manifest()
    assert written["spec"]["nodeSelector"] == {"gpu": "h100"}
    assert written["spec"]["volumes"] == [{"name": "v", "emptyDir": {"medium": "Memory"}}]


def test_gpus_per_pod_counts_the_limit() -> None:
    spec = service(prefill={"resources": {"limits": {"nvidia.com/gpu": 4}}})
    assert spec.prefill.gpus_per_pod == 4
    assert spec.prefill.resources.limits == {"nvidia.com/gpu": "4"}


def test_the_first_class_is_the_default_when_none_says_so() -> None:
    classes = [
        {"name": "a", "ttftMilliseconds": 1, "tbtMilliseconds": 1},
        {"name": "b", "ttftMilliseconds": 1, "tbtMilliseconds": 1},
    ]
    assert Slo.model_validate({"classes": classes}).default_class.name == "a"
    classes[1]["default"] = True
    assert Slo.model_validate({"classes": classes}).default_class.name == "b"


def test_status_writes_from_and_reads_it_back() -> None:
    decision = {
        "at": "2026-01-01T00:00:00Z",
        "pool": "Decode",
        "from": 4,
        "to": 5,
        "how": "RoleChange",
        "because": "predicted TBT 61 ms > 50 ms",
    }
    status = InferenceServiceStatus.model_validate({"scaling": [decision]})
    assert status.scaling[0].from_ == 4
    assert status.to_manifest()["scaling"] == [decision]


def test_conditions_need_a_reason_and_a_generation() -> None:
    condition = {
        "type": "Ready",
        "status": "True",
        "reason": "AllReady",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
        "observedGeneration": 3,
    }
    assert Condition.model_validate(condition).message == ""
    for missing in ("reason", "observedGeneration"):
        partial = {key: value for key, value in condition.items() if key != missing}
        with pytest.raises(ValidationError, match=missing):
            Condition.model_validate(partial)
