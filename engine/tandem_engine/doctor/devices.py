"""Checks of GPUs and RDMA devices: their files, links, addresses, distances."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tandem_engine.doctor.check import RDMA_TRANSPORTS, Check, Verdict, read_text
from tandem_engine.fabric.nic_map import GpuNics, Selection, map_nics, roce_gid
from tandem_engine.fabric.pci import Distance
from tandem_engine.fabric.sysfs import Fabric, Nic, Port

_ROCE_MTU: Final = 4200
"""What an interface needs for RoCE packets of 4096 bytes and their headers."""
_OPEN_DRIVER: Final = "Open Kernel Module"


def check_gpus(fabric: Fabric, root: Path) -> Iterator[Check]:
    """GPUs of this pod or node, and the device files without which none works."""
    files = sorted(path.name for path in (root / "dev").glob("nvidia[0-9]*"))
    if not files:
        node = len(fabric.gpus)
        found = f"none of the node's {node} GPUs is open here" if node else "no NVIDIA GPU"
        yield Check("gpu", "/dev/nvidia*", "ok", f"{found}: the model runs on the CPU")
        return
    missing = [name for name in ("nvidiactl", "nvidia-uvm") if not (root / "dev" / name).exists()]
    if missing:
        yield Check(
            "gpu",
            "/dev/nvidia*",
            "fail",
            f"{', '.join(files)} without {', '.join(missing)}",
            "install the NVIDIA container toolkit on the node and run the pod with its runtime",
        )
        return
    yield Check("gpu", "/dev/nvidia*", "ok", ", ".join(files))


def check_nics(fabric: Fabric, root: Path) -> Iterator[Check]:
    """RDMA devices that are open here; then of each its link, its address and its packet size."""
    nics = [nic for nic in fabric.nics if nic.open_to_pod]
    subject = "/dev/infiniband"
    if not fabric.nics:
        yield Check("rdma", subject, "ok", "no RDMA device: KV moves by other means")
        return
    if not nics:
        names = ", ".join(nic.name for nic in fabric.nics)
        yield Check(
            "rdma",
            subject,
            "warn",
            f"the node has {names}, but none of them is open here",
            "set rdma.mode to how the node gives its devices to pods",
            RDMA_TRANSPORTS,
        )
        return
    if not (root / "dev/infiniband/rdma_cm").exists() and any(nic.driver != "efa" for nic in nics):
        yield Check(
            "rdma",
            subject,
            "warn",
            f"{', '.join(nic.name for nic in nics)} without rdma_cm",
            "have the device plugin give pods /dev/infiniband/rdma_cm too",
            RDMA_TRANSPORTS,
        )
    else:
        yield Check("rdma", subject, "ok", ", ".join(nic.name for nic in nics))
    others = any(nic.best_port is not None for nic in nics)
    for nic in nics:
        if (port := nic.best_port) is None:
            yield _dead_link(nic, "warn" if others else "fail")
        else:
            yield from _check_port(nic, port, root)


def _check_port(nic: Nic, port: Port, root: Path) -> Iterator[Check]:
    rate = f"{port.gigabits:g} Gbit/s {port.link_layer}"
    yield Check("link", nic.name, "ok", f"port {port.number} is ACTIVE, {rate}")
    if port.link_layer == "Ethernet":
        yield from _check_roce(nic, port, root)


def _dead_link(nic: Nic, verdict: Verdict) -> Check:
    states = ", ".join(f"port {port.number} is {port.state}" for port in nic.ports) or "no port"
    remedy = "check the cable and the switch's port, and bring the interface up"
    if any(port.state == "INIT" or (port.state == "ACTIVE" and not port.lid) for port in nic.ports):
        states += ", without a LID"
        remedy = "start a subnet manager in the InfiniBand fabric"
    return Check("link", nic.name, verdict, states, remedy, RDMA_TRANSPORTS)


def _check_roce(nic: Nic, port: Port, root: Path) -> Iterator[Check]:
    gid = roce_gid(port)
    if gid is None:
        yield Check(
            "gid",
            nic.name,
            "fail",
            f"none of {len(port.gids)} GIDs is a routable one of RoCE v2",
            "give the device's network interface an IP address in this pod's network namespace",
            RDMA_TRANSPORTS,
        )
        return
    yield Check("gid", nic.name, "ok", f"index {gid.index}: {gid.address} ({gid.kind})")
    mtu = read_text(root / "sys/class/net" / gid.interface / "mtu") if gid.interface else ""
    if mtu.isdigit() and int(mtu) < _ROCE_MTU:
        yield Check(
            "mtu",
            gid.interface,
            "warn",
            f"{mtu} bytes, so RoCE packets are of 1024 bytes at most",
            f"set the MTU of the interface and of its switch to {_ROCE_MTU} or 9000",
            RDMA_TRANSPORTS,
        )
    elif mtu:
        yield Check("mtu", gid.interface, "ok", f"{mtu} bytes")


def check_distances(fabric: Fabric, selection: Selection) -> Iterator[Check]:
    """How near each GPU of this pod is to the NICs that it uses, of those that it may use."""
    for item in map_nics(fabric, selection):
        if item.gpu.own and item.ranked:
            yield _check_distance(item)


def _check_distance(item: GpuNics) -> Check:
    nearest = item.ranked[0].distance
    nics = ", ".join(nic.name for nic in item.chosen)
    found = f"{nics} at {nearest.name}"
    subject = item.gpu.function.address
    if nearest <= Distance.PXB:
        return Check("distance", subject, "ok", f"{found}: below one PCIe root")
    where = "by the host bridge" if nearest is Distance.PHB else "by the CPU's interconnect"
    return Check(
        "distance",
        subject,
        "warn",
        f"{found}: KV goes {where}",
        "give the pod a NIC of the GPU's PCIe root: by DRA with alignWith: PcieRoot, or by the"
        " kubelet's Topology Manager with the policy single-numa-node",
        RDMA_TRANSPORTS,
    )


PEER_MEMORY: Final = "peer memory"


def check_peer_memory(fabric: Fabric, root: Path) -> Iterator[Check]:
    """Whether RDMA devices can reach the memory of GPUs; only where there are both."""
    has_gpu = any((root / "dev").glob("nvidia[0-9]*"))
    if not has_gpu or not any(nic.open_to_pod for nic in fabric.nics):
        return
    if (root / "sys/module/nvidia_peermem").exists():
        yield Check(PEER_MEMORY, "nvidia_peermem", "ok", "the module is loaded")
        return
    driver = read_text(root / "proc/driver/nvidia/version")
    if _OPEN_DRIVER in driver and _kernel(root) >= (5, 12):
        yield Check(PEER_MEMORY, "dma-buf", "ok", "the open driver exports GPU memory")
        return
    yield Check(
        PEER_MEMORY,
        "nvidia_peermem",
        "warn",
        "no way from RDMA devices to GPU memory: KV goes through the host's memory",
        "run `modprobe nvidia_peermem` on the node, or use NVIDIA's open kernel driver on Linux"
        " 5.12 or newer",
        RDMA_TRANSPORTS,
    )


def _kernel(root: Path) -> tuple[int, int]:
    release = read_text(root / "proc/sys/kernel/osrelease").split(".")
    numbers = [int(part) for part in release[:2] if part.isdigit()]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)
