"""RDMA wiring: placement, resources, rights and environment inside the container, by mode.

All services start together, because starting is what takes the time.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service import Service, mock_manifest
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

DEVICES = Path("/dev/infiniband")
IPC_LOCK = 1 << 14
MODES: dict[str, dict[str, Any]] = {
    "auto": {"mode": "Auto"},
    "plugin": {"mode": "DevicePlugin", "resource": {"name": "rdma/ib"}, "sharedMemory": "64Mi"},
    "hostpath": {"mode": "HostPath", "devices": {"include": ["mlx5_0"], "gidIndex": "3"}},
    "plain": {"mode": "None"},
}
FABRIC = {
    "UCX_TLS": "rc,ud,sm,self,tcp",
    "NCCL_IB_DISABLE": "0",
    "MOONCAKE_PROTOCOL": "rdma",
    "MC_ENABLE_DEST_DEVICE_AFFINITY": "1",
}
PLAIN = {"NCCL_IB_DISABLE": "1", "MOONCAKE_PROTOCOL": "tcp"}
WITHOUT_DEVICES = ("plain",)
ENVIRONMENT = {
    "auto": FABRIC,
    "plugin": FABRIC,
    "hostpath": {
        **FABRIC,
        "UCX_NET_DEVICES": "mlx5_0:1",
        "NCCL_IB_HCA": "mlx5_0",
        "MOONCAKE_DEVICE": "mlx5_0",
        "UCX_IB_GID_INDEX": "3",
        "NCCL_IB_GID_INDEX": "3",
        "MC_GID_INDEX": "3",
    },
    "plain": PLAIN,
}
WIRING = {"auto": "DevicePlugin", "plugin": "DevicePlugin", "hostpath": "HostPath", "plain": "None"}
by_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def wired(tandem: Any) -> Iterator[dict[str, Service]]:
    existed = DEVICES.exists()
    services = {
        mode: Service.apply(tandem, mock_manifest(f"rdma-{mode}", decode=1, rdma=rdma))
        for mode, rdma in MODES.items()
    }
    try:
        for service in services.values():
            service.wait_ready(240)
        yield services
    finally:
        names = [service.name for service in services.values()]
        services["plain"].kubectl("delete", "tisvc", *names, "--wait=false")
        services["hostpath"].delete()
        if not existed and DEVICES.exists():
            DEVICES.rmdir()  # the kubelet made it for the HostPath service


def workers(service: Service) -> list[dict[str, Any]]:
    pods = service.pods("prefill") + service.pods("decode")
    assert len(pods) == 2
    return pods


@pytest.mark.parametrize("mode", ["auto", "plugin"])
def test_pods_land_where_the_fabric_is_and_hold_one_each(
    wired: dict[str, Service], mode: str
) -> None:
    for pod in workers(wired[mode]):
        assert pod["spec"]["nodeName"] == "node-0"
        resources = pod["spec"]["containers"][0]["resources"]
        assert resources["limits"]["rdma/ib"] == "1"
        assert resources["requests"]["rdma/ib"] == "1"


@pytest.mark.parametrize("mode", ["hostpath", "plain"])
def test_other_modes_take_no_device_from_the_plugin(wired: dict[str, Service], mode: str) -> None:
    for pod in workers(wired[mode]):
        assert "rdma/ib" not in pod["spec"]["containers"][0]["resources"].get("limits", {})


@by_mode
def test_the_environment_inside_is_what_the_mode_promises(
    wired: dict[str, Service], mode: str
) -> None:
    for pod in workers(wired[mode]):
        output = wired[mode].kubectl("exec", pod["metadata"]["name"], "--", "env")
        inside = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
        expected = ENVIRONMENT[mode]
        assert {name: inside.get(name) for name in expected} == expected
        assert mode not in WITHOUT_DEVICES or "rc" not in inside["UCX_TLS"].split(",")


@by_mode
def test_rights_and_devices_inside(wired: dict[str, Service], mode: str) -> None:
    for pod in workers(wired[mode]):
        script = (
            f"grep CapEff /proc/{wired[mode].worker_state(pod)['pid']}/status;"
            "grep -E ' /dev/(shm|infiniband) ' /proc/mounts"
        )
        seen = wired[mode].kubectl("exec", pod["metadata"]["name"], "--", "sh", "-c", script)
        rights = int(seen.split("CapEff:")[1].split()[0], 16)
        assert bool(rights & IPC_LOCK) == (mode not in WITHOUT_DEVICES)
        assert mode not in WITHOUT_DEVICES or rights == 0
        assert " /dev/shm tmpfs " in seen
        assert mode != "plugin" or "size=65536k" in seen
        # Every container of the embedded cluster sees the machine's /dev, so look at the volumes.
        paths = [volume.get("hostPath", {}).get("path") for volume in pod["spec"]["volumes"]]
        assert (str(DEVICES) in paths) == (mode == "hostpath")
        assert mode != "hostpath" or f" {DEVICES} " in seen


@by_mode
def test_status_names_the_choice(wired: dict[str, Service], mode: str) -> None:
    transport = wired[mode].get()["status"]["transport"]
    assert transport["wiring"] == WIRING[mode]
    verified = wired[mode].condition("TransportVerified")
    # The test cluster's devices are only numbers, and the operator must not be fooled.
    assert verified["status"] == ("True" if mode in WITHOUT_DEVICES else "False")
    assert mode in WITHOUT_DEVICES or "although RDMA is configured" in verified["message"]


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
