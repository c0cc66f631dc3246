"""Writes the chosen wiring into worker pods: devices, networks, capabilities, volumes, environment.

The environment has what a worker can't find out by itself. Which NICs are nearest to its GPUs it
finds in sysfs, and tells its libraries.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Final

from tandem_operator.api.pool import GPU_RESOURCE
from tandem_operator.api.rdma import (
    ClaimAlignment,
    Rdma,
    RdmaClaim,
    RdmaDevices,
    RdmaMode,
    RdmaNetwork,
)
from tandem_operator.names.pods import ENV_NIC_MAP, ENV_NICS

INFINIBAND_PATH: Final = "/dev/infiniband"
CLAIM: Final = "fabric"
"""The claim's name in a pod and in its engine container."""
MULTUS_NETWORKS: Final = "k8s.v1.cni.cncf.io/networks"
GKE_DEFAULT_INTERFACE: Final = "networking.gke.io/default-interface"
GKE_INTERFACES: Final = "networking.gke.io/interfaces"
GKE_RESOURCE_PREFIX: Final = "networking.gke.io.networks/"


@dataclass(frozen=True)
class Wiring:
    """What was chosen. `problem` says, with the remedy, why pods with it can't run now.

    `share` is how many pieces of the resource there are for each GPU. `rails` are the values of the
    rail attribute that the first, second … NIC of every pod must have.
    """

    mode: RdmaMode
    resource: str = ""
    count: str = "PerPod"
    share: int = 1
    networks: tuple[RdmaNetwork, ...] = ()
    claim: RdmaClaim | None = None
    rails: tuple[str | int | bool, ...] = ()
    problem: str = ""
    blocked: bool = False  # no pods until the problem is solved
    note: str = ""

    def pieces(self, num_gpus: int) -> int:
        """Extended resources that one pod asks for."""
        if not self.resource:
            return 0
        if self.count == "PerPod":
            return 1
        return self.share * max(1, num_gpus) if self.count == "PerGPU" else int(self.count)

    def claims_gpus(self, num_gpus: int) -> bool:
        """Whether the claim has the pod's GPUs too, so that they and the NICs go together."""
        aligned = self.claim is not None and self.claim.align_with is not ClaimAlignment.NONE
        return aligned and num_gpus > 0


@dataclass(frozen=True)
class PodWiring:
    """Parts for a worker pod."""

    volumes: tuple[dict[str, Any], ...]
    mounts: tuple[dict[str, Any], ...]
    env: dict[str, str]
    resources: dict[str, str] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()  # resources that the claim has instead
    claims: bool = False
    annotations: dict[str, str] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()
    restricted: bool = True  # the pod still passes Pod Security's `restricted`

    @property
    def check_memlock(self) -> bool:
        """Whether the pod looks at its memlock limit first."""
        return not self.restricted


def build_wiring(wiring: Wiring, rdma: Rdma, num_gpus: int) -> PodWiring:
    """The parts for one pod with `num_gpus` GPUs. Every pod gets /dev/shm."""
    shm = {"medium": "Memory", "sizeLimit": rdma.shared_memory}
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": shm}]
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if wiring.mode in (RdmaMode.NONE, RdmaMode.AUTO):
        return PodWiring(tuple(volumes), tuple(mounts), _plain_env())
    capabilities: tuple[str, ...] = ("IPC_LOCK",)
    if wiring.mode is RdmaMode.HOST_PATH:
        host = {"path": INFINIBAND_PATH, "type": "DirectoryOrCreate"}
        volumes.append({"name": "infiniband", "hostPath": host})
        mounts.append({"name": "infiniband", "mountPath": INFINIBAND_PATH})
        capabilities += ("SYS_RESOURCE",)
    efa = wiring.mode is RdmaMode.EFA
    gpus_claimed = wiring.claims_gpus(num_gpus)
    return PodWiring(
        volumes=tuple(volumes),
        mounts=tuple(mounts),
        env={**(_efa_env() if efa else _fabric_env(num_gpus)), **_devices_env(rdma.devices)},
        resources=_resources(wiring, num_gpus),
        left_out=frozenset({GPU_RESOURCE}) if gpus_claimed else frozenset(),
        claims=wiring.mode is RdmaMode.DRA,
        annotations=_annotations(wiring),
        capabilities=capabilities,
        restricted=False,
    )


def _resources(wiring: Wiring, num_gpus: int) -> dict[str, str]:
    if wiring.mode is RdmaMode.GKE:
        # One for each network; what else goes with it GKE adds by the annotation.
        return {f"{GKE_RESOURCE_PREFIX}{network.name}": "1" for network in wiring.networks}
    pieces = wiring.pieces(num_gpus)
    return {wiring.resource: str(pieces)} if pieces else {}


def _annotations(wiring: Wiring) -> dict[str, str]:
    if wiring.mode is RdmaMode.MULTUS:
        names = [
            f"{network.namespace}/{network.name}" if network.namespace else network.name
            for network in wiring.networks
        ]
        return {MULTUS_NETWORKS: ",".join(names)}
    if wiring.mode is RdmaMode.GKE:
        names = ["default", *(network.name for network in wiring.networks)]
        interfaces = [
            {"interfaceName": f"eth{number}", "network": name} for number, name in enumerate(names)
        ]
        return {GKE_DEFAULT_INTERFACE: "eth0", GKE_INTERFACES: json.dumps(interfaces)}
    return {}


def _plain_env() -> dict[str, str]:
    # Written explicitly, so that half-configured devices of a host are not used by accident.
    return {
        "UCX_TLS": "tcp,cuda_copy,cuda_ipc,sm,self",
        "NCCL_IB_DISABLE": "1",
        "MOONCAKE_PROTOCOL": "tcp",
    }


def _fabric_env(num_gpus: int) -> dict[str, str]:
    return {
        # cuda_copy and cuda_ipc must be named, else UCX can't touch GPU memory at all.
        "UCX_TLS": "rc,ud,cuda_copy,cuda_ipc,sm,self,tcp" if num_gpus else "rc,ud,sm,self,tcp",
        "NCCL_IB_DISABLE": "0",
        "MOONCAKE_PROTOCOL": "rdma",
        # A queue pair per destination device exhausts NICs in large fleets without it.
        "MC_ENABLE_DEST_DEVICE_AFFINITY": "1",
    }


def _efa_env() -> dict[str, str]:
    # EFA has no verbs that UCX, Mooncake or NCCL could use; libfabric has a provider for it, which
    # finds out by itself whether the device can reach GPU memory.
    return {**_plain_env(), "FI_PROVIDER": "efa", "FI_EFA_FORK_SAFE": "1"}


def _devices_env(devices: RdmaDevices) -> dict[str, str]:
    """What bounds the worker's choice of NICs, and the GID index, which the user may fix."""
    env = {ENV_NIC_MAP: str(devices.map)}
    if devices.include:
        env[ENV_NICS] = ",".join(devices.include)
    elif devices.exclude:
        env[ENV_NICS] = "^" + ",".join(devices.exclude)
    if devices.gid_index != "Auto":
        names = ("UCX_IB_GID_INDEX", "NCCL_IB_GID_INDEX", "MC_GID_INDEX")
        env |= dict.fromkeys(names, devices.gid_index)
    return env
