"""Checks of the libraries behind transports: whether they can be imported, and their version."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Final

from tandem_engine.doctor.check import Check
from tandem_wire.handoff import TransportChoice, TransportName, transport_name

_IMPORT_SECONDS: Final = 60.0
LIBRARIES: Final[dict[TransportName, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    # The package nixl only takes one of the others, that of torch's CUDA.
    "nixl": (("nixl", "nixl_cu13", "nixl_cu12"), ("nixl", "nixl-cu13", "nixl-cu12")),
    "mooncake": (
        ("mooncake.engine",),
        ("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda"),
    ),
}
"""By transport: the modules, of which one is enough, and the packages that have them."""
_MISSING: Final = "there is no module"

Load = Callable[[str], str]
"""Why a module can't be imported; empty if it can."""


def find_module(module: str) -> str:
    """Look for a module without running it."""
    package = module.partition(".")[0]
    return "" if importlib.util.find_spec(package) else f"{_MISSING} {package}"


def import_module(module: str) -> str:
    """Import a module in a process of its own: a library may crash, or hold on to devices."""
    if missing := find_module(module):
        return missing
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"importing it takes longer than {_IMPORT_SECONDS:g} s"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"importing it ended with code {done.returncode}"


def check_libraries(
    wanted: TransportChoice, load: Load, find_version: Callable[[str], str] | None = None
) -> Iterator[Check]:
    """Each library; one that is missing matters if `--transfer` names its transport."""
    version_of = find_version or _version
    for name, (modules, packages) in LIBRARIES.items():
        why = _try(modules, load)
        version = next(filter(None, map(version_of, packages)), "")
        if why.startswith(_MISSING):
            version = ""  # a package of that name, but another one
        if not why:
            yield Check("library", name, "ok", version or "of an unknown version")
        elif version or transport_name(wanted) == name:
            found = f"{version} is installed, but {why}" if version else why
            remedy = f"install tandem-inference[{name}] for this machine's CUDA"
            yield Check("library", name, "fail", found, remedy, (name,), (name,))
        else:
            yield Check("library", name, "ok", "not installed: --transfer Auto does without it")


def _try(modules: tuple[str, ...], load: Load) -> str:
    """Empty if one of them loads, else what keeps the first one that is there from it."""
    reasons: list[str] = []
    for module in modules:
        why = load(module)
        if not why:
            return ""
        reasons.append(why)
    return next((why for why in reasons if not why.startswith(_MISSING)), reasons[0])


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return ""
