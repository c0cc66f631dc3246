"""The image table: which image names exist in the embedded cluster, and what each one runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from tandem_local.components.command_lines import SEARCH_PATH
from tandem_local.folders import cache_dir
from tandem_local.spec import ImageEntry

REGISTRY = "ghcr.io/tandem-inference"
SHELL_IMAGE = "tandem.local/shell"
# Each image, and the console script that is its entry point, as in the Dockerfile.
ENTRYPOINTS = {
    "tandem-operator": "tandem-operator",
    "tandem-router": "tandem-router",
    "tandem-engine": "tandem-worker",
}
# The USER of those images, as in the Dockerfile.
IMAGE_USER = 65532
# Where models lie and how they are fetched: the user's own cache serves the pods too.
PASSED_ON = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HUGGINGFACE_HUB_CACHE",
    "XDG_CACHE_HOME",
)


def default_images(python_bin_dir: Path) -> tuple[ImageEntry, ...]:
    """The project's own images, run from an installed environment, and a shell for tests.

    `python_bin_dir` is the folder of the console scripts, such as ``.venv/bin``.
    """
    bin_dir = python_bin_dir.absolute()
    environment = {
        "PATH": f"{bin_dir}:{SEARCH_PATH}",
        "HOME": str(Path.home()),
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        # Several workers share the machine's cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(max(1, min(4, (os.cpu_count() or 1) // 2))),
    }
    environment |= {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    # Pods run under various users and share what they unpack, so this folder is like /tmp.
    shared = cache_dir() / "pods"
    shared.mkdir(parents=True, exist_ok=True)
    shared.chmod(0o1777)
    environment["TANDEM_CACHE_DIR"] = str(shared)
    # They can't write beside the installed modules, and compiling torch again doubles a start.
    environment["PYTHONPYCACHEPREFIX"] = str(shared / "bytecode")
    project = tuple(
        ImageEntry(f"{REGISTRY}/{image}:*", (str(bin_dir / script),), environment, user=IMAGE_USER)
        for image, script in ENTRYPOINTS.items()
    )
    return (*project, ImageEntry(f"{SHELL_IMAGE}:*", (), environment))


def write_images(path: Path, images: Iterable[ImageEntry]) -> None:
    """Write the table in one step; procri reads it again at each use."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"images": [image.to_table() for image in images]}, indent=2))
    os.replace(fresh, path)


def read_images(path: Path) -> tuple[ImageEntry, ...]:
    """The entries of the table at `path`."""
    entries = json.loads(path.read_text())["images"]
    return tuple(ImageEntry.from_table(entry) for entry in entries)


def merge_images(old: Iterable[ImageEntry], new: Iterable[ImageEntry]) -> tuple[ImageEntry, ...]:
    """`old` and `new` together; a new entry replaces an old one of the same name."""
    merged = {image.name: image for image in old}
    merged.update({image.name: image for image in new})
    return tuple(merged.values())
