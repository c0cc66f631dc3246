"""rdma.mode Dra: claims made by the operator's templates, allocated by the real scheduler.

Two DRA drivers run on each node, for NICs and for GPUs; the kubelets ask them as they would ask
real ones. What a container was given shows in its environment.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tandem_local import LocalCluster
from tests.dra_driver import Devices, dra_drivers
from tests.service import Service, mock_manifest
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NODES = ("node-0", "node-1")
ROOTS = ("pci0000:16", "pci0000:36", "pci0000:96", "pci0000:b6")
PCIE_ROOT = "resource.kubernetes.io/pcieRoot"
# Three of each rail and root, so that no other service can take all of those that one needs.
NICS: dict[str, dict[str, str | bool]] = {
    f"nic-{rail}-{number}": {"rdma": True, "ifName": f"gpu{rail}rdma0", PCIE_ROOT: root}
    for rail, root in enumerate(ROOTS)
    for number in range(3)
}
GPUS: dict[str, dict[str, str | bool]] = {
    f"gpu-{n}": {PCIE_ROOT: root} for n, root in enumerate(ROOTS)
}
OFFERS: dict[str, Devices] = {"dra.net": NICS, "gpu.example.com": GPUS}
CLASSES = {"dranet": "dra.net", "gpu": "gpu.example.com"}
IPC_LOCK = 1 << 14
CLAIMS: dict[str, dict[str, str]] = {
    "any": {"alignWith": "None"},
    "rails": {"rails": "SameAcrossRoles"},
    "gpus": {"gpuDeviceClass": "gpu"},
}


def manifest(name: str) -> dict[str, Any]:
    """The service that makes this claim; the one that claims GPUs asks for one in each pool."""
    made = mock_manifest(f"dra-{name}", decode=1, rdma={"mode": "Dra", "claim": CLAIMS[name]})
    for pool in ("prefill", "decode") if name == "gpus" else ():
        made["spec"][pool]["resources"] = {"limits": {"nvidia.com/gpu": "1"}}
    return made


@pytest.fixture(scope="module")
def claimed(local_cluster: LocalCluster, tandem: Any) -> Iterator[dict[str, Service]]:
    classes = [
        {
            "apiVersion": "resource.k8s.io/v1",
            "kind": "DeviceClass",
            "metadata": {"name": name},
            "spec": {"selectors": [{"cel": {"expression": f'device.driver == "{driver}"'}}]},
        }
        for name, driver in CLASSES.items()
    ]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": classes})
    local_cluster.kubectl("apply", "-f", "-", input=text)
    with dra_drivers(local_cluster, NODES, OFFERS):
        services = {name: Service.apply(tandem, manifest(name)) for name in CLAIMS}
        try:
            for service in services.values():
                service.wait_ready(240)
            yield services
        finally:
            names = [service.name for service in services.values()]
            services["any"].kubectl("delete", "tisvc", *names, "--wait=false")
            # The kubelet asks the drivers before a pod with a claim is gone.
            wait_for("every claim is gone", lambda: not claims_of(services["any"]), 120)
            local_cluster.kubectl("delete", "deviceclass", *CLASSES, "--wait=false")


def claims_of(service: Service) -> list[str]:
    """Every claim in the service's namespace."""
    return service.kubectl("get", "resourceclaims", "-o", "name").split()


def workers(service: Service) -> list[dict[str, Any]]:
    pods = service.pods("prefill") + service.pods("decode")
    assert len(pods) == 2
    return pods


def allocated(service: Service, pod: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """What the scheduler gave to a pod's claim: request → (driver, node, device)."""
    (status,) = pod["status"]["resourceClaimStatuses"]
    claim = service.get("resourceclaim", status["resourceClaimName"])
    assert [user["name"] for user in claim["status"]["reservedFor"]] == [pod["metadata"]["name"]]
    results = claim["status"]["allocation"]["devices"]["results"]
    return {one["request"]: (one["driver"], one["pool"], one["device"]) for one in results}


def environment(service: Service, pod: dict[str, Any]) -> dict[str, str]:
    output = service.kubectl("exec", pod["metadata"]["name"], "-c", "engine", "--", "env")
    return dict(line.split("=", 1) for line in output.splitlines() if "=" in line)


by_service = pytest.mark.parametrize("name", CLAIMS)


@by_service
def test_each_worker_holds_the_devices_it_claimed(claimed: dict[str, Service], name: str) -> None:
    service = claimed[name]
    for pod in workers(service):
        given = allocated(service, pod)
        assert set(given) == ({"nic-0", "gpu-0"} if name == "gpus" else {"nic-0"})
        assert {node for _, node, _ in given.values()} == {pod["spec"]["nodeName"]}
        inside = environment(service, pod)
        seen = {key: value for key, value in inside.items() if key.startswith("CLAIMED_")}
        assert seen == {
            f"CLAIMED_{device.replace('-', '_')}": driver for driver, _, device in given.values()
        }
        assert "rc" in inside["UCX_TLS"].split(",")
        assert inside["MOONCAKE_PROTOCOL"] == "rdma"
        assert inside["TANDEM_NIC_MAP"] == "PerGPU"
        status = f"/proc/{service.worker_state(pod)['pid']}/status"
        rights = service.kubectl(
            "exec", pod["metadata"]["name"], "-c", "engine", "--", "grep", "CapEff", status
        )
        assert int(rights.split()[1], 16) & IPC_LOCK


def test_no_device_is_given_twice(claimed: dict[str, Service]) -> None:
    given = [
        device
        for service in claimed.values()
        for pod in workers(service)
        for device in allocated(service, pod).values()
    ]
    assert len(given) == len(set(given)) == 8


def test_nics_are_on_the_pcie_root_of_their_gpus(claimed: dict[str, Service]) -> None:
    service = claimed["gpus"]
    for pod in workers(service):
        given = allocated(service, pod)
        gpu, nic = given["gpu-0"][2], given["nic-0"][2]
        assert GPUS[gpu][PCIE_ROOT] == NICS[nic][PCIE_ROOT]
        # The claim has the GPU, so the device plugin is not asked for another one.
        limits = pod["spec"]["containers"][0]["resources"].get("limits", {})
        assert "nvidia.com/gpu" not in limits


def test_all_workers_get_nics_of_one_rail(claimed: dict[str, Service]) -> None:
    service = claimed["rails"]
    given = [allocated(service, pod)["nic-0"] for pod in workers(service)]
    rails = {NICS[device]["ifName"] for _, _, device in given}
    (template,) = {
        json.dumps(service.get("resourceclaimtemplate", name)["spec"]["spec"], sort_keys=True)
        for name in (
            claim["resourceClaimTemplateName"]
            for pod in workers(service)
            for claim in pod["spec"]["resourceClaims"]
        )
    }
    assert len(rails) == 1
    assert f'ifName == \\"{rails.pop()}\\"' in template


@by_service
def test_status_names_the_choice(claimed: dict[str, Service], name: str) -> None:
    assert claimed[name].get()["status"]["transport"]["wiring"] == "Dra"


def test_a_template_that_is_not_used_any_more_goes(claimed: dict[str, Service]) -> None:
    service = claimed["any"]

    def templates() -> set[str]:
        text = service.kubectl(
            *("get", "resourceclaimtemplates", "-o", "name"),
            *("-l", f"tandem.dev/service={service.name}"),
        )
        return set(text.split())

    before = templates()
    assert len(before) == 2
    service.kubectl(
        *("patch", "tisvc", service.name, "--type=merge"),
        *("-p", json.dumps({"spec": {"rdma": {"mode": "None", "claim": None}}})),
    )
    wait_for("the templates are gone", lambda: not templates(), 120)
    service.wait_ready(120)
    assert all("resourceClaims" not in pod["spec"] for pod in workers(service))


def test_a_missing_class_is_a_condition(claimed: dict[str, Service], tandem: Any) -> None:
    rdma = {"mode": "Dra", "claim": {"deviceClass": "infiniband"}}
    service = Service.apply(tandem, mock_manifest("noclass", decode=1, rdma=rdma))
    try:

        def told() -> str:
            condition = service.condition("CapacityUnavailable")
            return condition["message"] if condition.get("status") == "True" else ""

        message = wait_for("CapacityUnavailable is True", told, 30)
        assert "there is no DeviceClass infiniband" in message
        assert "rdma.claim.deviceClass" in message
    finally:
        service.kubectl("delete", "tisvc", service.name, "--wait=false")
