"""Which NICs each GPU uses: the nearest ones, divided among the GPUs that are equally near."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tandem_engine.fabric.pci import Distance
from tandem_engine.fabric.sysfs import ROCE_V2, Fabric, Gid, Gpu, Nic, Port

_SAME_SPEED = 2.0
"""NICs more than this factor slower than the fastest carry something else, such as storage."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which NICs may be used, by name. An empty `include` means all."""

    include: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()

    def takes(self, name: str) -> bool:
        """Whether this NIC may be used."""
        return name not in self.exclude and (not self.include or name in self.include)


@dataclass(frozen=True, slots=True)
class RankedNic:
    """A NIC as a GPU sees it."""

    nic: Nic
    distance: Distance


@dataclass(frozen=True, slots=True)
class GpuNics:
    """The NICs of one GPU."""

    gpu: Gpu
    ranked: tuple[RankedNic, ...]
    """All that may be used, the nearest first."""
    chosen: tuple[Nic, ...]
    """Those that this GPU uses."""


def candidates(fabric: Fabric, selection: Selection = Selection()) -> tuple[Nic, ...]:
    """The NICs that can carry KV: open to the pod, their link up, on the fastest kind of link.

    A node has NICs for storage and management too, which reach other networks.
    """
    usable = [
        (nic, port)
        for nic in fabric.nics
        if nic.open_to_pod and selection.takes(nic.name) and (port := nic.best_port) is not None
    ]
    if not usable:
        return ()
    _, fastest = max(usable, key=lambda item: (item[1].gigabits, _layer_order(item[1])))
    return tuple(
        nic
        for nic, port in usable
        if port.link_layer == fastest.link_layer and port.gigabits * _SAME_SPEED >= fastest.gigabits
    )


def map_nics(fabric: Fabric, selection: Selection = Selection()) -> tuple[GpuNics, ...]:
    """The NICs of every GPU of the node, by PCI address.

    Pods of one node come to choices that go together, because each looks at all GPUs of the node.
    """
    nics = candidates(fabric, selection)
    ranked = [_rank(gpu, nics) for gpu in fabric.gpus]
    nearest = [_nearest(order) for order in ranked]
    return tuple(
        GpuNics(gpu, order, _share(group, nearest[:number].count(group), nearest.count(group)))
        for number, (gpu, order, group) in enumerate(zip(fabric.gpus, ranked, nearest, strict=True))
    )


def _rank(gpu: Gpu, nics: Sequence[Nic]) -> tuple[RankedNic, ...]:
    seen = [RankedNic(nic, _distance(gpu, nic)) for nic in nics]
    # `nics` is ordered by name, and sorting keeps that order among equals.
    return tuple(sorted(seen, key=lambda item: item.distance))


def _distance(gpu: Gpu, nic: Nic) -> Distance:
    return Distance.SYS if nic.function is None else gpu.function.distance(nic.function)


def _nearest(ranked: Sequence[RankedNic]) -> tuple[RankedNic, ...]:
    return tuple(item for item in ranked if item.distance == ranked[0].distance)


def _share(group: tuple[RankedNic, ...], number: int, sharers: int) -> tuple[Nic, ...]:
    """The part of a group for one of several GPUs that are equally near to all of it."""
    nics = tuple(item.nic for item in group)
    if len(nics) <= sharers:
        return (nics[number * len(nics) // sharers],) if nics else ()
    first, last = (position * len(nics) // sharers for position in (number, number + 1))
    return nics[first:last]


def _layer_order(port: Port) -> int:
    return int(port.link_layer == "InfiniBand")


def roce_gid(port: Port) -> Gid | None:
    """The GID to use on Ethernet: RoCE v2, of an IPv4 address if there is one, never link-local."""
    entries = [gid for gid in port.gids if gid.kind == ROCE_V2 and not _link_local(gid)]
    return min(entries, key=lambda gid: (not _is_ipv4(gid), gid.index), default=None)


def _is_ipv4(gid: Gid) -> bool:
    return gid.address.startswith("0000:0000:0000:0000:0000:ffff:")


def _link_local(gid: Gid) -> bool:
    return gid.address.startswith("fe80:")


def render_map(maps: Sequence[GpuNics]) -> dict[str, Any]:
    """The map as JSON: for every GPU its NICs, the nearest first, and those that it uses."""
    return {
        item.gpu.function.address: {
            "own": item.gpu.own,
            "numa_node": item.gpu.function.numa_node,
            "use": [nic.name for nic in item.chosen],
            "nics": [
                {"name": near.nic.name, "distance": near.distance.name} for near in item.ranked
            ],
        }
        for item in maps
    }
