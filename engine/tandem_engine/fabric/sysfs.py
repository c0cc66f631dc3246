"""Reads GPUs and NICs of a node. Every path is below a root, so that tests can make a node.

Sysfs shows all PCI functions of the node in every pod; which GPUs and NICs the pod may use shows in
its own `/dev`, and in `/proc/driver/nvidia`, of which the NVIDIA runtime leaves the pod's GPUs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem_engine.fabric.pci import PciFunction, read_function

_NVIDIA: Final = "0x10de"
_DISPLAY_CLASSES: Final = ("0x0300", "0x0302")
_EMPTY_GID: Final = "0000:0000:0000:0000:0000:0000:0000:0000"
ROCE_V2: Final = "RoCE v2"


@dataclass(frozen=True, slots=True)
class Gid:
    """One entry of a port's GID table."""

    index: int
    address: str
    kind: str
    """RoCE v2 or IB/RoCE v1; empty if the kernel doesn't say."""
    interface: str = ""
    """The network interface of a RoCE entry."""


@dataclass(frozen=True, slots=True)
class Port:
    """One port of a NIC."""

    number: int
    state: str
    """ACTIVE, INIT, DOWN …"""
    link_layer: str
    """InfiniBand, Ethernet (RoCE) or Unspecified (EFA)."""
    gigabits: float
    """The link's rate in Gbit/s; 0 if it isn't known."""
    lid: int
    """The address that an InfiniBand subnet manager gave it; 0 without one."""
    gids: tuple[Gid, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether the port can reach others."""
        return self.state == "ACTIVE" and (self.link_layer != "InfiniBand" or self.lid > 0)


@dataclass(frozen=True, slots=True)
class Nic:
    """An RDMA device."""

    name: str
    """Such as mlx5_0 or rdmap16s27."""
    function: PciFunction | None
    """None for a software device, such as rxe0."""
    driver: str
    """Such as mlx5_core, efa or irdma."""
    ports: tuple[Port, ...]
    character_device: str
    """Such as uverbs0; empty if there is none."""
    open_to_pod: bool
    """Whether that device is in `/dev/infiniband` here."""

    @property
    def best_port(self) -> Port | None:
        """The fastest port that can reach others."""
        usable = [port for port in self.ports if port.usable]
        return max(usable, key=lambda port: (port.gigabits, -port.number), default=None)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of the node."""

    function: PciFunction
    minor: int | None
    """The number of /dev/nvidiaN, if the driver says."""
    uuid: str
    own: bool
    """Whether this pod may use it."""


@dataclass(frozen=True, slots=True)
class Fabric:
    """What the node has, by PCI address and by name."""

    gpus: tuple[Gpu, ...]
    nics: tuple[Nic, ...]


def read_fabric(root: Path = Path("/")) -> Fabric:
    """GPUs and NICs of the node whose file system is at `root`."""
    return Fabric(_read_gpus(root), _read_nics(root))


def _read_gpus(root: Path) -> tuple[Gpu, ...]:
    shown = {path.name.lower(): path for path in _entries(root / "proc/driver/nvidia/gpus")}
    found = []
    for device in _entries(root / "sys/bus/pci/devices"):
        if _text(device / "vendor") != _NVIDIA:
            continue
        function = read_function(device)
        if function is None or not _text(device / "class").startswith(_DISPLAY_CLASSES):
            continue
        told = _information(shown.get(function.address))
        number = told.get("Device Minor", "")
        minor = int(number) if number.isdigit() else None
        own = function.address in shown
        # A bare container shows the driver's whole list, but has the device files of its own GPUs.
        own = own and (minor is None or (root / f"dev/nvidia{minor}").exists())
        found.append(Gpu(function, minor, told.get("GPU UUID", ""), own))
    return tuple(sorted(found, key=lambda gpu: gpu.function))


def _information(folder: Path | None) -> dict[str, str]:
    text = _text(folder / "information") if folder is not None else ""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _read_nics(root: Path) -> tuple[Nic, ...]:
    verbs = {
        _text(path / "ibdev"): path.name
        for path in _entries(root / "sys/class/infiniband_verbs")
        if (path / "ibdev").exists()
    }
    found = []
    for entry in _entries(root / "sys/class/infiniband"):
        driver = entry / "device/driver"
        device = verbs.get(entry.name, "")
        found.append(
            Nic(
                name=entry.name,
                function=read_function(entry / "device"),
                driver=driver.resolve().name if driver.exists() else "",
                ports=tuple(_read_port(path) for path in _entries(entry / "ports")),
                character_device=device,
                open_to_pod=bool(device) and (root / "dev/infiniband" / device).exists(),
            )
        )
    return tuple(sorted(found, key=lambda nic: natural(nic.name)))


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key by which mlx5_10 comes after mlx5_9."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _read_port(folder: Path) -> Port:
    rate = re.match(r"[0-9.]+", _text(folder / "rate"))
    lid = _text(folder / "lid")
    return Port(
        number=int(folder.name),
        state=_text(folder / "state").rpartition(":")[2].strip(),
        link_layer=_text(folder / "link_layer"),
        gigabits=float(rate[0]) if rate else 0.0,
        lid=int(lid, 0) if lid else 0,
        gids=tuple(_read_gids(folder)),
    )


def _read_gids(port: Path) -> Iterator[Gid]:
    for path in sorted(_entries(port / "gids"), key=lambda path: int(path.name)):
        address = _text(path)
        if address and address != _EMPTY_GID:
            kind = _text(port / "gid_attrs/types" / path.name)
            interface = _text(port / "gid_attrs/ndevs" / path.name)
            yield Gid(int(path.name), address, kind, interface)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    """A file's text; empty if there is none. The kernel refuses to read an empty GID's type."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
