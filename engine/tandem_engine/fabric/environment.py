"""What libraries are told of the NICs, through the variables that they read at their start.

A variable that is set already stays: the user has the last word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tandem_engine.errors import ConfigError
from tandem_engine.fabric.nic_map import (
    GpuNics,
    Selection,
    candidates,
    map_nics,
    render_map,
    roce_gid,
)
from tandem_engine.fabric.sysfs import Nic, natural, read_fabric

ENV_NICS: Final = "TANDEM_NICS"
ENV_NIC_MAP: Final = "TANDEM_NIC_MAP"
PER_GPU: Final = "PerGPU"
ALL: Final = "All"
_GID_VARIABLES: Final = ("UCX_IB_GID_INDEX", "NCCL_IB_GID_INDEX", "MC_GID_INDEX")


@dataclass(frozen=True, slots=True)
class FabricChoice:
    """The NICs of this worker, and what its libraries are told."""

    nics: tuple[Nic, ...]
    maps: tuple[GpuNics, ...]
    variables: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """The choice for `/state`."""
        return {
            "nics": [nic.name for nic in self.nics],
            "gpus": render_map(self.maps),
            "variables": dict(self.variables),
        }


NO_FABRIC: Final = FabricChoice((), (), {})


def choose_fabric(environ: Mapping[str, str], root: Path = Path("/")) -> FabricChoice:
    """The NICs for the pod's own GPUs, or all that can carry KV if the pod has no GPU.

    `variables` has only what is missing in `environ`. Raises ConfigError when TANDEM_NICS or
    TANDEM_NIC_MAP can't be understood.
    """
    selection = parse_selection(environ.get(ENV_NICS, ""))
    mode = environ.get(ENV_NIC_MAP, PER_GPU)
    if mode not in (PER_GPU, ALL):
        raise ConfigError(f"{ENV_NIC_MAP} is {mode!r}; set it to {PER_GPU} or {ALL}")
    fabric = read_fabric(root)
    maps = map_nics(fabric, selection)
    own = [nic for item in _visible(maps, environ) for nic in item.chosen]
    every = candidates(fabric, selection)
    chosen = every if mode == ALL or not own else tuple(dict.fromkeys(own))
    told = tell(chosen) or _tell_names(selection)
    told = {name: value for name, value in told.items() if not environ.get(name)}
    if not _uses_nics(environ.get("UCX_TLS", "")):
        # It bounds TCP's interfaces too, and would leave it none.
        told.pop("UCX_NET_DEVICES", None)
    return FabricChoice(chosen, maps, told)


def _visible(maps: Sequence[GpuNics], environ: Mapping[str, str]) -> list[GpuNics]:
    """The pod's GPUs; of these, those in CUDA_VISIBLE_DEVICES, by number or by (short) UUID."""
    own = [item for item in maps if item.gpu.own]
    text = environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return own
    return [
        item
        for number, item in enumerate(own)
        for name in text.split(",")
        if name == str(number) or (name.startswith("GPU-") and item.gpu.uuid.startswith(name))
    ]


def parse_selection(text: str) -> Selection:
    """The NICs in TANDEM_NICS: mlx5_0,mlx5_1 are the only ones to use, ^mlx5_bond_0 one not to."""
    refused = text.startswith("^")
    names = frozenset(name.strip() for name in text.removeprefix("^").split(","))
    if not text:
        return Selection()
    if not all(names):
        raise ConfigError(
            f"{ENV_NICS} is {text!r}, where a name is empty; write for example mlx5_0,mlx5_1 or"
            " ^mlx5_bond_0"
        )
    return Selection(exclude=names) if refused else Selection(include=names)


def _uses_nics(transports: str) -> bool:
    """Whether UCX may use RDMA devices, by its variable UCX_TLS; by default it may use all."""
    names = transports.split(",")
    return not transports or any(name.startswith(("all", "ib", "rc", "dc", "ud")) for name in names)


def _tell_names(selection: Selection) -> dict[str, str]:
    """The variables for NICs of which sysfs shows none that works: a library then says so itself,
    instead of taking one that the user didn't mean."""
    if selection.include:
        names = sorted(selection.include, key=natural)
        ports = ",".join(f"{name}:1" for name in names)
        nccl = "=" + ",".join(names)
        return {"UCX_NET_DEVICES": ports, "NCCL_IB_HCA": nccl, "MOONCAKE_DEVICE": ",".join(names)}
    return {}


def tell(nics: Sequence[Nic]) -> dict[str, str]:
    """The variables that make the libraries use these NICs and no others."""
    if not nics:
        return {}
    names = ",".join(nic.name for nic in nics)
    if all(nic.driver == "efa" for nic in nics):
        return {"FI_EFA_IFACE": names}
    ports = [(nic, port) for nic in nics if (port := nic.best_port) is not None]
    numbered = ",".join(f"{nic.name}:{port.number}" for nic, port in ports)
    told = {
        "UCX_NET_DEVICES": numbered,
        # Without the equals sign, mlx5_1 would mean mlx5_10 too.
        "NCCL_IB_HCA": f"={numbered}",
        "MOONCAKE_DEVICE": names,
    }
    gids = [roce_gid(port) for _, port in ports if port.link_layer == "Ethernet"]
    indices = {gid.index if gid is not None else None for gid in gids}
    # The index differs between virtual functions; then each library has to look for itself.
    if len(indices) == 1 and (index := indices.pop()) is not None:
        told |= dict.fromkeys(_GID_VARIABLES, str(index))
    return told
