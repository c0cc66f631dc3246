"""All checks of one machine or pod. Files are read below a root, so that tests can make a node."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tandem_engine.doctor import devices, libraries, limits
from tandem_engine.doctor.check import Check
from tandem_engine.errors import ConfigError
from tandem_engine.fabric.environment import ENV_NICS, parse_selection
from tandem_engine.fabric.nic_map import Selection
from tandem_engine.fabric.sysfs import read_fabric
from tandem_wire.handoff import TransportChoice, TransportName, transport_name


def examine(
    root: Path = Path("/"),
    environ: Mapping[str, str] | None = None,
    *,
    wanted: TransportChoice = "Auto",
    space_of: limits.Measure = limits.measure,
    load: libraries.Load = libraries.import_module,
) -> list[Check]:
    """Every check, in the order in which one would look.

    `wanted` is `--transfer`. `load` tries a library; `libraries.find_module` only looks for it.
    """
    environ = os.environ if environ is None else environ
    fabric = read_fabric(root)
    return [
        *devices.check_gpus(fabric, root),
        *devices.check_nics(fabric, root),
        *devices.check_peer_memory(fabric, root),
        *devices.check_distances(fabric, _selection(environ)),
        *limits.check_cpus(fabric, root),
        *limits.check_memlock(fabric, root),
        *limits.check_shared_memory(environ, root, space_of),
        *limits.check_huge_pages(fabric, root),
        *limits.check_interfaces(root),
        *libraries.check_libraries(wanted, load),
    ]


def _selection(environ: Mapping[str, str]) -> Selection:
    try:
        return parse_selection(environ.get(ENV_NICS, ""))
    except ConfigError:
        return Selection()  # the worker refuses it, with the reason


def look_around(wanted: TransportChoice, shm_dir: str) -> list[Check]:
    """Every check that a worker makes at its start; none of them runs a library."""
    environ = {**os.environ, "TANDEM_SHM_DIR": shm_dir}
    return examine(environ=environ, wanted=wanted, load=libraries.find_module)


def troubles(checks: Iterable[Check], wanted: TransportChoice) -> list[Check]:
    """Those that are not `ok` and matter to a worker that was started with `--transfer wanted`."""
    name = transport_name(wanted)
    return [
        check
        for check in checks
        if check.verdict != "ok"
        and (name == "auto" or not check.matters_to or name in check.matters_to)
    ]


def ruled_out(checks: Iterable[Check]) -> dict[TransportName, str]:
    """The transports that can't work here, each with its first reason."""
    reasons: dict[TransportName, str] = {}
    for check in checks:
        for name in check.rules_out:
            reasons.setdefault(name, check.sentence)
    return reasons


def no_peer_memory(checks: Iterable[Check]) -> str:
    """Why RDMA devices can't reach the memory of GPUs here; empty: they can, or there are none."""
    found = (check for check in checks if check.name == devices.PEER_MEMORY)
    return next((check.sentence for check in found if check.verdict != "ok"), "")


def report(checks: Iterable[Check]) -> dict[str, Any]:
    """The document of `tandem doctor -o json`."""
    found = [check.as_json() for check in checks]
    return {"ok": all(check["verdict"] != "fail" for check in found), "checks": found}
