"""Checks of memory that may be locked, huge pages, shared memory, CPUs and plain interfaces."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem_engine.doctor.check import RDMA_TRANSPORTS, Check, read_text
from tandem_engine.fabric.sysfs import Fabric

_CAP_IPC_LOCK: Final = 14
_MIN_LOCKED: Final = 64 << 30
_MIN_SHARED: Final = 1 << 30
_RING_BYTES: Final = 64 << 20
"""What one session of the transport shm needs."""
_MIN_MTU: Final = 1280
_EVERYWHERE: Final = "00000000"
"""The destination of a default route."""
_EFA_PAGES: Final = 512
"""Huge pages of 2 MiB that libfabric wants for EFA."""


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes of a file system."""

    total: int
    free: int


Measure = Callable[[Path], Space]


def measure(folder: Path) -> Space:
    """The space of the file system that has `folder`."""
    found = os.statvfs(folder)
    return Space(found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail)


def check_memlock(fabric: Fabric, root: Path) -> Iterator[Check]:
    """Memory that RDMA devices use must be locked; a capability lifts the limit."""
    match = re.search(r"^Max locked memory\s+(\S+)", read_text(root / "proc/self/limits"), re.M)
    if match is None:
        return
    status = read_text(root / "proc/self/status")
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.M)
    free = effective is not None and bool(int(effective[1], 16) >> _CAP_IPC_LOCK & 1)
    limit = match[1]
    if limit == "unlimited" or free:
        how = "unlimited" if limit == "unlimited" else "no limit, by the capability IPC_LOCK"
        yield Check("memlock", "this process", "ok", how)
        return
    found = f"{_size(int(limit))} may be locked"
    if not any(nic.open_to_pod for nic in fabric.nics):
        yield Check("memlock", "this process", "ok", f"{found}; no RDMA device needs more")
    elif int(limit) < _MIN_LOCKED:
        yield Check(
            "memlock",
            "this process",
            "fail",
            f"only {found}, so RDMA devices can't use the KV cache",
            "give the container the capability IPC_LOCK (every rdma.mode but None does), or set"
            " LimitMEMLOCK=infinity for the container runtime on the node",
            RDMA_TRANSPORTS,
            RDMA_TRANSPORTS,
        )
    else:
        yield Check("memlock", "this process", "ok", found)


def check_huge_pages(fabric: Fabric, root: Path) -> Iterator[Check]:
    """Huge pages, which only EFA's library wants."""
    numbers = dict(re.findall(r"^(HugePages_\w+):\s+(\d+)", read_text(root / "proc/meminfo"), re.M))
    free, total = (int(numbers.get(f"HugePages_{name}", 0)) for name in ("Free", "Total"))
    found = f"{free} of {total} are free"
    needed = any(nic.open_to_pod and nic.driver == "efa" for nic in fabric.nics)
    if needed and free < _EFA_PAGES:
        yield Check(
            "hugepages",
            "/proc/meminfo",
            "warn",
            f"{found}, but EFA's library wants {_EFA_PAGES}",
            "request hugepages-2Mi: 5120Mi in the pool's resources, and reserve them on the node",
            RDMA_TRANSPORTS,
        )
    else:
        yield Check("hugepages", "/proc/meminfo", "ok", found)


def check_shared_memory(
    environ: Mapping[str, str], root: Path, space_of: Measure = measure
) -> Iterator[Check]:
    """/dev/shm, and the folder that the transport shm uses."""
    shm = root / "dev/shm"
    if not shm.is_dir():
        yield Check(
            "shared memory",
            "/dev/shm",
            "fail",
            "there is none",
            "mount a memory-backed emptyDir at /dev/shm (rdma.sharedMemory is its size)",
            ("shm",),
        )
    else:
        space = space_of(shm)
        found = f"{_size(space.free)} of {_size(space.total)} are free"
        if space.total < _MIN_SHARED:
            remedy = "set rdma.sharedMemory, or mount a memory-backed emptyDir at /dev/shm"
            yield Check("shared memory", "/dev/shm", "warn", found, remedy)
        else:
            yield Check("shared memory", "/dev/shm", "ok", found)
    folder = environ.get("TANDEM_SHM_DIR", "")
    if folder:
        yield _check_ring_folder(folder, root, space_of)


def _check_ring_folder(folder: str, root: Path, space_of: Measure) -> Check:
    path = root / folder.lstrip("/")
    if not path.is_dir() or not os.access(path, os.W_OK):
        return Check(
            "shared memory",
            folder,
            "fail",
            "TANDEM_SHM_DIR is not a folder that this process may write",
            "mount a folder of the node there, writable for the container's user",
            ("cudaIpc", "cudaIpcRing", "shm"),
            ("cudaIpc", "cudaIpcRing", "shm"),
        )
    space = space_of(path)
    if space.free < _RING_BYTES:
        return Check(
            "shared memory",
            folder,
            "fail",
            f"{_size(space.free)} are free, but a session of the transport shm needs"
            f" {_size(_RING_BYTES)}",
            "remove what other processes left there, or make it larger",
            ("shm",),
            ("shm",),
        )
    return Check("shared memory", folder, "ok", f"{_size(space.free)} are free for rings")


def check_interfaces(root: Path) -> Iterator[Check]:
    """The packet size of the interfaces with a default route: TCP uses those."""
    routes = (line.split() for line in read_text(root / "proc/net/route").splitlines())
    names = {fields[0] for fields in routes if fields[1:2] == [_EVERYWHERE]}
    for name in sorted(names):
        mtu = read_text(root / "sys/class/net" / name / "mtu")
        if not mtu.isdigit():
            continue
        if int(mtu) < _MIN_MTU:
            remedy = f"set it to {_MIN_MTU} or more, in the configuration of the network plugin"
            yield Check("mtu", name, "warn", f"{mtu} bytes", remedy, ("tcp",))
        else:
            yield Check("mtu", name, "ok", f"{mtu} bytes")


def check_cpus(fabric: Fabric, root: Path) -> Iterator[Check]:
    """Whether this process may run on the NUMA nodes of its GPUs."""
    nodes = sorted(
        {
            gpu.function.numa_node
            for gpu in fabric.gpus
            if gpu.own and gpu.function.numa_node is not None
        }
    )
    status = read_text(root / "proc/self/status")
    allowed = re.search(r"^Cpus_allowed_list:\s*(\S+)", status, re.M)
    if not nodes or allowed is None:
        return
    mine = _numbers(allowed[1])
    for node in nodes:
        theirs = _numbers(read_text(root / f"sys/devices/system/node/node{node}/cpulist"))
        if theirs and not mine & theirs:
            yield Check(
                "numa",
                f"node {node}",
                "warn",
                f"its GPUs are this pod's, but the pod's CPUs ({allowed[1]}) are of other nodes",
                "set the kubelet's Topology Manager to single-numa-node, with whole CPUs in the"
                " pool's resources",
            )
        elif theirs:
            yield Check("numa", f"node {node}", "ok", "the pod has CPUs beside its GPUs")


def _numbers(text: str) -> frozenset[int]:
    """The CPUs in a list such as 0-3,8."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _size(num_bytes: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes} bytes"
