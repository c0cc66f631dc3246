"""Builds the part of a node's file system that the fabric is read from.

A PCI path is written from the host bridge down, such as "pci0000:16 0000:16:01.0 0000:17:00.0", and
ends with the function itself.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class FakeGpu:
    """One GPU. `minor` None leaves it out of what the pod may use."""

    path: str
    numa: int
    minor: int | None = 0


@dataclass(frozen=True)
class FakeNic:
    """One RDMA device with one port."""

    name: str
    path: str
    numa: int
    link: str = "InfiniBand"
    state: str = "4: ACTIVE"
    rate: str = "400 Gb/sec (4X NDR)"
    lid: int = 1
    driver: str = "mlx5_core"
    gids: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    """Address and type by index."""
    open_to_pod: bool = True


def build_tree(root: Path, gpus: Iterable[FakeGpu] = (), nics: Iterable[FakeNic] = ()) -> Path:
    """Writes the node below `root`, with relative links as in sysfs. Returns `root`."""
    for folder in ("sys/bus/pci/devices", "sys/class/infiniband", "sys/class/infiniband_verbs"):
        (root / folder).mkdir(parents=True)
    for gpu in gpus:
        _build_gpu(root, gpu)
    for number, nic in enumerate(nics):
        _build_nic(root, nic, number)
    return root


def _build_gpu(root: Path, gpu: FakeGpu) -> None:
    device = _build_function(root, gpu.path, gpu.numa)
    _write(device, {"vendor": "0x10de", "class": "0x030200"})
    if gpu.minor is not None:
        told = f"Model:\tNVIDIA H100\nGPU UUID:\tGPU-{gpu.minor}\nDevice Minor:\t {gpu.minor}"
        _write(root / "proc/driver/nvidia/gpus" / device.name, {"information": told})
        _write(root / "dev", {f"nvidia{gpu.minor}": ""})


def _build_nic(root: Path, nic: FakeNic, number: int) -> None:
    device = _build_function(root, nic.path, nic.numa)
    _write(device, {"vendor": "0x15b3", "class": "0x020700"})
    driver = root / "sys/bus/pci/drivers" / nic.driver
    driver.mkdir(parents=True, exist_ok=True)
    _link(device / "driver", driver)
    own = device / "infiniband" / nic.name
    port = {"state": nic.state, "rate": nic.rate, "link_layer": nic.link, "lid": hex(nic.lid)}
    _write(own / "ports/1", port)
    for index in range(max(nic.gids, default=-1) + 2):
        address, kind = nic.gids.get(index, (":".join(["0000"] * 8), ""))
        _write(own / "ports/1/gids", {str(index): address})
        if kind:
            _write(own / "ports/1/gid_attrs/types", {str(index): kind})
            _write(own / "ports/1/gid_attrs/ndevs", {str(index): f"eth{number}"})
    _link(own / "device", device)
    _link(root / "sys/class/infiniband" / nic.name, own)
    verbs = device / "infiniband_verbs" / f"uverbs{number}"
    _write(verbs, {"ibdev": nic.name})
    _link(root / "sys/class/infiniband_verbs" / verbs.name, verbs)
    if nic.open_to_pod:
        _write(root / "dev/infiniband", {verbs.name: ""})


def _build_function(root: Path, path: str, numa: int) -> Path:
    device = root.joinpath("sys/devices", *path.split())
    device.mkdir(parents=True, exist_ok=True)
    _write(device, {"numa_node": str(numa)})
    _link(root / "sys/bus/pci/devices" / device.name, device)
    return device


def _link(link: Path, target: Path) -> None:
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(target, link.parent))


def _write(folder: Path, files: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")
