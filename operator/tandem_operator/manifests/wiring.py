"""Writes the chosen wiring into worker pods: resources, capabilities, volumes, environment.

The environment has what a library can't find out by itself. Which NIC is nearest to which GPU is
found inside the pod, from sysfs; only what the user fixed is written here.
"""

from dataclasses import dataclass
from typing import Any

from tandem_operator.api.rdma import Rdma, RdmaDevices, RdmaMode

INFINIBAND_PATH = "/dev/infiniband"


@dataclass(frozen=True)
class Wiring:
    """What was chosen. `problem` says, with the remedy, why it can't work now.

    `supported` is False for a mode that this release doesn't have.
    """

    mode: RdmaMode
    resource: str = ""
    count: str = "PerPod"
    problem: str = ""
    supported: bool = True
    note: str = ""

    def pieces(self, num_gpus: int) -> int:
        """Extended resources that one pod asks for."""
        if not self.resource:
            return 0
        if self.count == "PerPod":
            return 1
        return max(1, num_gpus) if self.count == "PerGPU" else int(self.count)


@dataclass(frozen=True)
class PodWiring:
    """Parts for a worker pod."""

    resources: dict[str, str]
    capabilities: tuple[str, ...]
    volumes: tuple[dict[str, Any], ...]
    mounts: tuple[dict[str, Any], ...]
    env: dict[str, str]
    restricted: bool  # the pod still passes Pod Security's `restricted`
    check_memlock: bool


def build_wiring(wiring: Wiring, rdma: Rdma, num_gpus: int) -> PodWiring:
    """The parts for one pod with `num_gpus` GPUs. Every pod gets /dev/shm."""
    volumes: list[dict[str, Any]] = [
        {
            "name": "shm",
            "emptyDir": {"medium": "Memory", "sizeLimit": rdma.shared_memory},
        }
    ]
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if wiring.mode is RdmaMode.DEVICE_PLUGIN:
        return PodWiring(
            resources={wiring.resource: str(wiring.pieces(num_gpus))},
            capabilities=("IPC_LOCK",),
            volumes=tuple(volumes),
            mounts=tuple(mounts),
            env=_fabric_env(rdma.devices, num_gpus),
            restricted=False,
            check_memlock=True,
        )
    if wiring.mode is RdmaMode.HOST_PATH:
        volumes.append(
            {
                "name": "infiniband",
                "hostPath": {"path": INFINIBAND_PATH, "type": "DirectoryOrCreate"},
            }
        )
        mounts.append({"name": "infiniband", "mountPath": INFINIBAND_PATH})
        return PodWiring(
            resources={},
            capabilities=("IPC_LOCK", "SYS_RESOURCE"),
            volumes=tuple(volumes),
            mounts=tuple(mounts),
            env=_fabric_env(rdma.devices, num_gpus),
            restricted=False,
            check_memlock=True,
        )
    return PodWiring({}, (), tuple(volumes), tuple(mounts), _plain_env(), True, False)


def _plain_env() -> dict[str, str]:
    # Written explicitly, so that half-configured devices of a host are not used by accident.
    return {
        "UCX_TLS": "tcp,cuda_copy,cuda_ipc,sm,self",
        "NCCL_IB_DISABLE": "1",
        "MOONCAKE_PROTOCOL": "tcp",
    }


def _fabric_env(devices: RdmaDevices, num_gpus: int) -> dict[str, str]:
    env = {
        # cuda_copy and cuda_ipc must be named, else UCX can't touch GPU memory at all.
        "UCX_TLS": "rc,ud,cuda_copy,cuda_ipc,sm,self,tcp" if num_gpus else "rc,ud,sm,self,tcp",
        "NCCL_IB_DISABLE": "0",
        "MOONCAKE_PROTOCOL": "rdma",
        # A queue pair per destination device exhausts NICs in large fleets without it.
        "MC_ENABLE_DEST_DEVICE_AFFINITY": "1",
    }
    if devices.include:
        env["UCX_NET_DEVICES"] = ",".join(f"{name}:1" for name in devices.include)
        env["NCCL_IB_HCA"] = ",".join(devices.include)
        env["MOONCAKE_DEVICE"] = ",".join(devices.include)
    elif devices.exclude:
        env["NCCL_IB_HCA"] = "^" + ",".join(devices.exclude)
        env["UCX_NET_DEVICES"] = "^" + ",".join(f"{name}:1" for name in devices.exclude)
    if devices.gid_index != "Auto":
        env["UCX_IB_GID_INDEX"] = devices.gid_index
        env["NCCL_IB_GID_INDEX"] = devices.gid_index
        env["MC_GID_INDEX"] = devices.gid_index
    return env
