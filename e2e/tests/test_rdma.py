"""RDMA wiring: placement, resources, environment, and a condition where no node offers a fabric."""

import json
from typing import Any

import pytest

from tests.service import Service, mock_manifest
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def offer(cluster: Any, node: str, count: int | None) -> None:
    """Set or remove rdma/ib on a node's status."""
    value = None if count is None else str(count)
    patch = json.dumps(
        {"status": {"capacity": {"rdma/ib": value}, "allocatable": {"rdma/ib": value}}}
    )
    cluster.kubectl("patch", "node", node, "--subresource=status", "--type=merge", "-p", patch)


def test_pods_land_where_the_fabric_is(tandem: Any) -> None:
    offer(tandem, "node-0", 8)
    manifest = mock_manifest(
        "fabric", decode=1, rdma={"mode": "DevicePlugin", "resource": {"name": "rdma/ib"}}
    )
    service = Service.apply(tandem, manifest)
    try:
        service.wait_ready()
        for role in ("prefill", "decode"):
            for pod in service.pods(role):
                limits = pod["spec"]["containers"][0]["resources"]["limits"]
                assert limits["rdma/ib"] == "1"
                assert pod["spec"]["nodeName"] == "node-0"
                added = pod["spec"]["containers"][0]["securityContext"]["capabilities"]["add"]
                assert "IPC_LOCK" in added
                name = pod["metadata"]["name"]
                environment = service.kubectl("exec", name, "--", "env")
                assert "UCX_TLS=" in environment
                assert "NCCL_IB_" in environment
                shm = service.kubectl("exec", name, "--", "sh", "-c", "grep /dev/shm /proc/mounts")
                assert "tmpfs" in shm
        assert service.get()["status"]["transport"]["wiring"] == "DevicePlugin"
    finally:
        service.delete()
        offer(tandem, "node-0", None)


def test_a_missing_fabric_is_a_condition(tandem: Any) -> None:
    manifest = mock_manifest(
        "nofabric", decode=1, rdma={"mode": "DevicePlugin", "resource": {"name": "rdma/hca"}}
    )
    service = Service.apply(tandem, manifest)
    try:

        def told() -> dict[str, Any] | None:
            condition = service.condition("CapacityUnavailable")
            return condition if condition.get("status") == "True" else None

        condition = wait_for("CapacityUnavailable is True", told, 30)
        assert "rdma/hca" in condition["message"]
        assert "rdma.mode" in condition["message"]
    finally:
        service.delete()
