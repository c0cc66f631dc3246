"""RDMA wiring: placement, resources, rights and environment inside the container, by mode.

All services start together, because starting is what takes the time. Claims are in
`test_rdma_claims.py`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem_operator.names.worker import LIBFABRIC_TRANSPORTS, RDMA_TRANSPORTS
from tests.service import Service, mock_manifest
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

DEVICES = Path("/dev/infiniband")
IPC_LOCK = 1 << 14
MODES: dict[str, dict[str, Any]] = {
    "auto": {"mode": "Auto"},
    "plugin": {"mode": "DevicePlugin", "resource": {"name": "rdma/ib"}, "sharedMemory": "64Mi"},
    "hostpath": {"mode": "HostPath", "devices": {"include": ["mlx5_0"], "gidIndex": "3"}},
    "plain": {"mode": "None", "placement": {"roles": "Pack"}},
    "multus": {
        "mode": "Multus",
        "networks": [{"name": "rail0"}, {"name": "rail1", "namespace": "kube-public"}],
        "resource": {"name": "openshift.io/rail0", "count": "2"},
    },
    "efa": {"mode": "Efa"},
    "gke": {"mode": "Gke", "networks": [{"name": "rdma-0"}]},
}
FABRIC = {
    "UCX_TLS": "rc,ud,sm,self,tcp",
    "NCCL_IB_DISABLE": "0",
    "MOONCAKE_PROTOCOL": "rdma",
    "MC_ENABLE_DEST_DEVICE_AFFINITY": "1",
    "TANDEM_NIC_MAP": "PerGPU",
}
PLAIN = {"NCCL_IB_DISABLE": "1", "MOONCAKE_PROTOCOL": "tcp"}
EFA = {**PLAIN, "FI_PROVIDER": "efa", "TANDEM_NIC_MAP": "PerGPU"}
# Without a transport that uses RDMA, Auto is as good as None; with one, it takes the plugin's.
WITHOUT_DEVICES = ("plain",) if RDMA_TRANSPORTS else ("auto", "plain")
ENVIRONMENT = {
    "auto": FABRIC if RDMA_TRANSPORTS else PLAIN,
    "plugin": FABRIC,
    "hostpath": {
        **FABRIC,
        "TANDEM_NICS": "mlx5_0",
        "UCX_IB_GID_INDEX": "3",
        "NCCL_IB_GID_INDEX": "3",
        "MC_GID_INDEX": "3",
    },
    "plain": PLAIN,
    "multus": FABRIC,
    "efa": EFA,
    "gke": FABRIC,
}
WIRING = {
    "auto": "DevicePlugin" if RDMA_TRANSPORTS else "None",
    "plugin": "DevicePlugin",
    "hostpath": "HostPath",
    "plain": "None",
    "multus": "Multus",
    "efa": "Efa",
    "gke": "Gke",
}
ATTACHMENTS = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: network-attachment-definitions.k8s.cni.cncf.io}
spec:
  group: k8s.cni.cncf.io
  scope: Namespaced
  names:
    kind: NetworkAttachmentDefinition
    plural: network-attachment-definitions
    shortNames: [net-attach-def]
  versions:
    - name: v1
      served: true
      storage: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            spec: {type: object, properties: {config: {type: string}}}
"""
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


def test_pods_land_where_the_fabric_is_and_hold_one_each(wired: dict[str, Service]) -> None:
    for pod in workers(wired["plugin"]):
        assert pod["spec"]["nodeName"] == "node-0"
        resources = pod["spec"]["containers"][0]["resources"]
        assert resources["limits"]["rdma/ib"] == "1"
        assert resources["requests"]["rdma/ib"] == "1"


def test_efa_workers_hold_devices_on_nodes_of_their_own(wired: dict[str, Service]) -> None:
    prefill, decode = wired["efa"].pods("prefill"), wired["efa"].pods("decode")
    nodes = [{pod["spec"]["nodeName"] for pod in pods} for pods in (prefill, decode)]
    assert not nodes[0] & nodes[1]
    for pod in prefill + decode:
        limits = pod["spec"]["containers"][0]["resources"]["limits"]
        assert limits["vpc.amazonaws.com/efa"] == "1"


def test_packed_workers_share_a_node(wired: dict[str, Service]) -> None:
    assert len({pod["spec"]["nodeName"] for pod in workers(wired["plain"])}) == 1


def test_networks_of_gke_are_requested_and_named(wired: dict[str, Service]) -> None:
    for pod in workers(wired["gke"]):
        assert pod["spec"]["nodeName"] == "node-0"
        limits = pod["spec"]["containers"][0]["resources"]["limits"]
        assert limits["networking.gke.io.networks/rdma-0"] == "1"
        interfaces = pod["metadata"]["annotations"]["networking.gke.io/interfaces"]
        assert json.loads(interfaces) == [
            {"interfaceName": "eth0", "network": "default"},
            {"interfaceName": "eth1", "network": "rdma-0"},
        ]


def define_network(service: Service, name: str, namespace: str) -> None:
    """Makes a NetworkAttachmentDefinition, as soon as the API server serves the kind."""
    metadata = {"name": name, "namespace": namespace}
    kind = {"apiVersion": "k8s.cni.cncf.io/v1", "kind": "NetworkAttachmentDefinition"}
    text = json.dumps({**kind, "metadata": metadata, "spec": {"config": "{}"}})

    def made() -> bool:
        done = service.cluster.kubectl("apply", "-f", "-", input=text, check=False)
        return bool(done.returncode == 0)

    wait_for(f"{name} is there", made, 30)


def test_the_attachments_that_multus_is_told_exist(wired: dict[str, Service]) -> None:
    service = wired["multus"]
    service.cluster.kubectl("apply", "-f", "-", input=ATTACHMENTS)
    kind = "network-attachment-definitions.k8s.cni.cncf.io"
    service.kubectl("wait", "--for=condition=Established", f"crd/{kind}")
    for name, namespace in (("rail0", service.namespace), ("rail1", "kube-public")):
        define_network(service, name, namespace)
    for pod in workers(service):
        assert pod["spec"]["nodeName"] == "node-0"
        limits = pod["spec"]["containers"][0]["resources"]["limits"]
        assert limits["openshift.io/rail0"] == "2"
        for name in pod["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"].split(","):
            namespace, _, network = name.rpartition("/")
            service.cluster.kubectl("get", kind, network, "-n", namespace or service.namespace)


@pytest.mark.parametrize("mode", [*WITHOUT_DEVICES, "hostpath", "multus", "efa", "gke"])
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
        assert ("rc" in inside["UCX_TLS"].split(",")) == (expected["MOONCAKE_PROTOCOL"] == "rdma")


def test_the_worker_tells_its_libraries_the_nics(wired: dict[str, Service]) -> None:
    for pod in workers(wired["hostpath"]):
        told = wired["hostpath"].worker_state(pod)["fabric"]["variables"]
        assert told["UCX_NET_DEVICES"] == "mlx5_0:1"
        assert told["NCCL_IB_HCA"].startswith("=mlx5_0")


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
    used = transport["backend"] in (LIBFABRIC_TRANSPORTS if mode == "efa" else RDMA_TRANSPORTS)
    as_it_should_be = used or mode in WITHOUT_DEVICES
    assert verified["status"] == ("True" if as_it_should_be else "False")
    assert as_it_should_be or "although RDMA is configured" in verified["message"]


def test_auto_says_why_it_takes_no_devices(wired: dict[str, Service]) -> None:
    degraded = wired["auto"].condition("Degraded")
    without = "rdma.mode Auto takes no RDMA devices" in degraded["message"]
    assert without == (not RDMA_TRANSPORTS)
    assert degraded["status"] == "False" or not without


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
