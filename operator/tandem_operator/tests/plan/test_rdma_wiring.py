"""RDMA: the wiring that is chosen, and what it writes into pods."""

from typing import Any

import pytest

from tandem_operator.api.conditions import ConditionType
from tandem_operator.api.rdma import Rdma, RdmaMode
from tandem_operator.facts.observed import NodeView, PoolView
from tandem_operator.manifests.wiring import Wiring, build_wiring
from tandem_operator.manifests.worker import Blueprint, build_worker_pod
from tandem_operator.pair import Pair, Role
from tandem_operator.plan import reconcile
from tandem_operator.plan.wiring import choose_wiring
from tandem_operator.tests.facts import NOW, make_observed, make_spec

IB = NodeView("ib", True, {"rdma/ib": 8})
SHARED = NodeView("shared", True, {"rdma/hca_shared_devices_a": 63})
PLAIN = NodeView("plain", True, {})
CORDONED = NodeView("cordoned", False, {"rdma/ib": 8})


def rdma(**fields: Any) -> Rdma:
    return Rdma.model_validate(fields)


def automatic(
    nodes: tuple[NodeView, ...] | None,
    recorded: RdmaMode | None = None,
    transports: tuple[str, ...] = ("Nixl",),
) -> Wiring:
    """What Auto chooses in a release with these transports over RDMA."""
    return choose_wiring(rdma(), nodes, 0, recorded, transports)


def test_auto_takes_what_the_nodes_offer() -> None:
    assert automatic((PLAIN, IB)).resource == "rdma/ib"
    assert automatic((SHARED,)).resource == "rdma/hca_shared_devices_a"
    assert automatic((SHARED, IB)).resource == "rdma/ib"


def test_auto_falls_back_to_the_plain_network_and_says_so() -> None:
    wiring = automatic((PLAIN, CORDONED))
    assert wiring.mode is RdmaMode.NONE
    assert "no node offers" in wiring.note
    assert not wiring.problem


def test_auto_keeps_a_recorded_plain_choice() -> None:
    assert automatic((IB,), RdmaMode.NONE).mode is RdmaMode.NONE
    assert automatic((IB,), RdmaMode.DEVICE_PLUGIN).resource == "rdma/ib"


def test_auto_without_the_right_to_read_nodes() -> None:
    wiring = automatic(None)
    assert wiring.mode is RdmaMode.NONE
    assert "namespaced" in wiring.note


def test_auto_takes_no_device_that_no_transport_uses() -> None:
    for recorded in (None, RdmaMode.NONE, RdmaMode.DEVICE_PLUGIN):
        wiring = automatic((IB,), recorded, transports=())
        assert (wiring.mode, wiring.resource, wiring.problem) == (RdmaMode.NONE, "", "")
        assert "no transport of this release uses them" in wiring.note


def test_auto_on_rdma_nodes_makes_pods_that_hold_devices() -> None:
    spec = make_spec(rdma={})
    pools = Pair.build(lambda role: PoolView(f"qwen-{role}", str(role), 1, 1, 1))
    plan = reconcile(make_observed(spec, pools=pools, nodes=(IB,)), NOW)
    assert len(plan.create) == 3
    for pod in plan.create:
        is_worker = pod["metadata"]["labels"]["tandem.dev/role"] != "router"
        limits = pod["spec"]["containers"][0]["resources"].get("limits", {})
        assert ("rdma/ib" in limits) == is_worker
    assert plan.status is not None
    assert plan.status["transport"]["wiring"] == "DevicePlugin"


def test_a_missing_fabric_names_resource_and_remedy() -> None:
    wiring = choose_wiring(rdma(mode="DevicePlugin"), (PLAIN, CORDONED), 0)
    assert "rdma/ib" in wiring.problem
    assert "rdma.mode: None" in wiring.problem


@pytest.mark.parametrize(
    ("count", "gpus", "pieces"), [("PerPod", 8, 1), ("PerGPU", 4, 4), ("2", 8, 2)]
)
def test_count_means_what_it_says(count: str, gpus: int, pieces: int) -> None:
    fields = rdma(mode="DevicePlugin", resource={"name": "rdma/ib", "count": count})
    wiring = choose_wiring(fields, (IB,), gpus)
    assert wiring.pieces(gpus) == pieces
    assert not wiring.problem


def test_more_than_a_node_has_is_told() -> None:
    fields = rdma(mode="DevicePlugin", resource={"name": "rdma/ib", "count": "9"})
    assert "more than 8" in choose_wiring(fields, (IB,), 0).problem


def test_modes_of_later_releases_are_refused() -> None:
    wiring = choose_wiring(rdma(mode="Efa"), (IB,), 0)
    assert "not supported" in wiring.problem


def test_device_plugin_writes_resources_capabilities_and_environment() -> None:
    fields = rdma(mode="DevicePlugin", devices={"exclude": ["mlx5_bond_0"], "gidIndex": "3"})
    parts = build_wiring(choose_wiring(fields, (IB,), 0), fields, 0)
    assert parts.resources == {"rdma/ib": "1"}
    assert parts.capabilities == ("IPC_LOCK",)
    assert parts.env["NCCL_IB_HCA"] == "^mlx5_bond_0"
    assert parts.env["UCX_IB_GID_INDEX"] == parts.env["MC_GID_INDEX"] == "3"
    assert parts.env["MOONCAKE_PROTOCOL"] == "rdma"
    assert not parts.restricted


def test_gpu_pods_let_ucx_touch_gpu_memory() -> None:
    fields = rdma(mode="DevicePlugin", devices={"include": ["mlx5_0", "mlx5_1"]})
    parts = build_wiring(choose_wiring(fields, (IB,), 1), fields, 1)
    assert "cuda_copy" in parts.env["UCX_TLS"]
    assert parts.env["UCX_NET_DEVICES"] == "mlx5_0:1,mlx5_1:1"


def test_host_path_mounts_the_devices() -> None:
    fields = rdma(mode="HostPath")
    parts = build_wiring(choose_wiring(fields, (PLAIN,), 0), fields, 0)
    assert {"name": "infiniband", "mountPath": "/dev/infiniband"} in parts.mounts
    assert "SYS_RESOURCE" in parts.capabilities
    assert not parts.resources


def test_none_is_said_out_loud_and_stays_restricted() -> None:
    fields = rdma(mode="None", sharedMemory="4Gi")
    parts = build_wiring(choose_wiring(fields, (IB,), 0), fields, 0)
    assert parts.env["NCCL_IB_DISABLE"] == "1"
    assert parts.restricted
    assert parts.volumes[0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}


def test_the_pod_checks_memlock_before_rdma() -> None:
    spec = make_spec(rdma={"mode": "DevicePlugin"})
    observed = make_observed(spec, pools=Pair(None, PoolView("qwen-decode", "1", 1, 1, 1)))
    wiring = choose_wiring(spec.rdma, (IB,), 0)
    worker = Blueprint(Role.DECODE, "qwen-decode-abc", "r1", wiring)
    pod = build_worker_pod(observed, spec, worker)
    check = pod["spec"]["initContainers"][0]
    assert "ulimit -l" in check["command"][-1]
    assert pod["spec"]["securityContext"]["runAsUser"] == 0
    container = pod["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"rdma/ib": "1"}
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


def test_a_missing_fabric_is_a_condition() -> None:
    spec = make_spec(rdma={"mode": "DevicePlugin"})
    plan = reconcile(make_observed(spec, nodes=(PLAIN,)), NOW)
    assert plan.status is not None
    conditions = {item["type"]: item for item in plan.status["conditions"]}
    for kind in (ConditionType.CAPACITY_UNAVAILABLE, ConditionType.DEGRADED):
        assert conditions[kind]["status"] == "True"
        assert conditions[kind]["reason"] == "FabricUnavailable"
    assert conditions["PrefillReady"]["reason"] == "FabricUnavailable"
    assert "rdma/ib" in conditions["PrefillReady"]["message"]


def test_a_stored_backend_without_code_makes_no_pods() -> None:
    spec = make_spec(kvTransfer={"backend": "CudaIpc"})
    pools = Pair.build(lambda role: PoolView(f"qwen-{role}", str(role), 1, 1, 1))
    plan = reconcile(make_observed(spec, pools=pools), NOW)
    assert not plan.create
    assert plan.status is not None
    ready = next(item for item in plan.status["conditions"] if item["type"] == "DecodeReady")
    assert ready["reason"] == "Unsupported"
    assert "kvTransfer.backend is CudaIpc" in ready["message"]
    assert "Auto or Shm or" in ready["message"]


def test_an_unsupported_mode_makes_no_pods() -> None:
    spec = make_spec(rdma={"mode": "Dra", "claim": {}})
    pools = Pair.build(lambda role: PoolView(f"qwen-{role}", str(role), 1, 1, 1))
    plan = reconcile(make_observed(spec, pools=pools), NOW)
    assert not plan.create
    assert plan.status is not None
    ready = next(item for item in plan.status["conditions"] if item["type"] == "DecodeReady")
    assert ready["reason"] == "Unsupported"
