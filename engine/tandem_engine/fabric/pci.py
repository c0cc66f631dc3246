"""PCI functions and how far apart two of them are."""

import os
import re
from dataclasses import dataclass
from enum import IntEnum
from itertools import takewhile
from pathlib import Path
from typing import Final

_HOST_BRIDGE: Final = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}")
_FUNCTION: Final = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


class Distance(IntEnum):
    """What lies between two functions, by the names of `nvidia-smi topo`; less is nearer."""

    PIX = 0
    """One PCIe switch."""
    PXB = 1
    """Several PCIe switches."""
    PHB = 2
    """The host bridge."""
    NODE = 3
    """The interconnect of host bridges of one NUMA node."""
    SYS = 4
    """The interconnect of NUMA nodes, or nothing that is known."""


@dataclass(frozen=True, slots=True, order=True)
class PciFunction:
    """One function, such as a GPU or a virtual function of a NIC."""

    address: str
    """Such as 0000:19:00.0."""
    path: tuple[str, ...]
    """The host bridge and the bridges above the function, from the host down."""
    numa_node: int | None = None
    """None: the machine doesn't say."""

    def distance(self, other: "PciFunction") -> Distance:
        """How far the other function is."""
        pairs = zip(self.path, other.path, strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if shared >= 2:
            below = max(len(self.path), len(other.path)) - shared
            return Distance.PIX if below <= 1 else Distance.PXB
        if shared == 1:
            return Distance.PHB
        if self.numa_node is not None and self.numa_node == other.numa_node:
            return Distance.NODE
        return Distance.SYS


def read_function(device: Path) -> PciFunction | None:
    """The function whose folder in sysfs, or a link to it, is `device`; None if it isn't PCI."""
    parts = Path(os.path.realpath(device)).parts
    roots = [number for number, part in enumerate(parts) if _HOST_BRIDGE.fullmatch(part)]
    if not roots or not _FUNCTION.fullmatch(parts[-1]):
        return None
    return PciFunction(parts[-1], parts[roots[-1] : -1], _read_numa_node(device))


def _read_numa_node(device: Path) -> int | None:
    try:
        number = int((device / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return number if number >= 0 else None
