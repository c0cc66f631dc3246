"""The image table: which image names exist in the embedded cluster, and what each one runs.

An image consists of files of this machine: a virtual environment, its interpreter, the sources of
an editable install. They stay where they are, whatever volumes a pod mounts, and every user can
read them. User, environment and folders that can be written are those of the Dockerfile.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tandem_local.components.command_lines import SEARCH_PATH
from tandem_local.errors import RequirementError
from tandem_local.folders import cache_dir
from tandem_local.nodes.holder import PRIVATE_FOLDERS
from tandem_local.progress import Progress, ProgressEvent
from tandem_local.spec import ImageEntry

REGISTRY = "ghcr.io/tandem-inference"
SHELL_IMAGE = "tandem.local/shell"
# Each image, and the console script that is its entry point, as in the Dockerfile.
ENTRYPOINTS = {
    "tandem-operator": "tandem-operator",
    "tandem-router": "tandem-router",
    "tandem-engine": "tandem-worker",
}
ENGINE_IMAGE = "tandem-engine"
# The USER of those images, as in the Dockerfile.
IMAGE_USER = 65532
# The HOME of those images, which every user can write, and the variables that name it; as in the
# Dockerfile, and nothing of the environment that the cluster was started in.
HOME = "/var/cache/tandem"
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "LANG": "C.UTF-8",
    "HOME": HOME,
    "TANDEM_CACHE_DIR": HOME,
    "XDG_CACHE_HOME": f"{HOME}/xdg",
    "HF_HOME": f"{HOME}/huggingface",
}
ENGINE_ENVIRONMENT = {
    **ENVIRONMENT,
    "TRITON_CACHE_DIR": f"{HOME}/triton",
    "TORCHINDUCTOR_CACHE_DIR": f"{HOME}/inductor",
    "CUDA_CACHE_PATH": f"{HOME}/cuda",
}
# Only the engine's image has a C compiler.
COMPILERS = ("cc", "c89", "c99", "c89-*", "c99-*", "gcc", "gcc-[0-9]*", "clang", "clang-*", "tcc")
# What a node or a container has of its own, so that the machine's files there can't be seen.
REPLACED = (*PRIVATE_FOLDERS, "/proc", "/sys")
# What an interpreter reads: a virtual environment, its modules, its headers and its own library,
# but not all of the prefix that it was installed to, which may be somebody's home.
INTERPRETER = """\
import json, os, sys, sysconfig
paths = [*sys.path, sysconfig.get_paths()["include"]]
paths += [sys.prefix] if sys.prefix != sys.base_prefix else []
library = [sysconfig.get_config_var(name) for name in ("LIBDIR", "INSTSONAME")]
paths += [os.path.join(*library)] if all(library) else []
print(json.dumps([path for path in paths if os.path.exists(path)]))
"""


def default_images(python_bin_dir: Path) -> tuple[ImageEntry, ...]:
    """The project's own images, run from an installed environment, and a shell for tests.

    `python_bin_dir` is the folder of the console scripts, such as ``.venv/bin``.
    """
    bin_dir = python_bin_dir.absolute()
    # A real image has the bytecode of its modules. Here the first pod that imports one keeps it for
    # the others, which run under various users, so this folder is like /tmp.
    bytecode = cache_dir() / "pods" / "bytecode"
    bytecode.mkdir(parents=True, exist_ok=True)
    for folder in (bytecode.parent, bytecode):
        folder.chmod(0o1777)
    ours = {"PATH": f"{bin_dir}:{SEARCH_PATH}", "PYTHONPYCACHEPREFIX": str(bytecode)}
    files, compilers = image_files(bin_dir), find_compilers()
    project = tuple(
        ImageEntry(
            f"{REGISTRY}/{image}:*",
            (str(bin_dir / script),),
            {**(ENGINE_ENVIRONMENT if image == ENGINE_IMAGE else ENVIRONMENT), **ours},
            user=IMAGE_USER,
            files=files,
            shared=(str(bytecode),),
            scratch=(HOME,),
            hidden=() if image == ENGINE_IMAGE else compilers,
        )
        for image, script in ENTRYPOINTS.items()
    )
    shell = {"PYTHONUNBUFFERED": "1", "LANG": "C.UTF-8", **ours}
    return (
        *project,
        ImageEntry(f"{SHELL_IMAGE}:*", (), shell, files=files, shared=(str(bytecode),)),
    )


def find_compilers() -> tuple[str, ...]:
    """The C compilers of the machine's system, by every name."""
    found = {
        str(path)
        for folder in SEARCH_PATH.split(os.pathsep)
        for name in (*COMPILERS, *(f"*-linux-*-{name}" for name in COMPILERS))
        for path in Path(folder).glob(name)
    }
    return tuple(sorted(found))


def image_files(bin_dir: Path) -> tuple[str, ...]:
    """The folders and files that an environment's programs read, by every name that they have."""
    python = bin_dir / Path(sys.executable).name
    if not python.exists():
        python = Path(sys.executable)
    # -I, because pods don't get our PYTHONPATH.
    told = subprocess.run(
        [str(python), "-I", "-c", INTERPRETER], capture_output=True, text=True, check=True
    )
    paths = [*_links(python), *map(Path, json.loads(told.stdout))]
    names = {name for path in paths for name in (path, path.resolve())}
    return tuple(
        str(path) for path in sorted(names) if path.is_absolute() and names.isdisjoint(path.parents)
    )


def _links(path: Path) -> Iterator[Path]:
    """A path, and every link from it to the file itself."""
    yield path
    while path.is_symlink():
        path = path.parent / path.readlink()
        yield path


def check_images(images: Iterable[ImageEntry], progress: Progress) -> None:
    """See that pods will find and be allowed to read what their images consist of.

    What is only for its owner, after an installation under a strict umask, is opened to all; the
    folders above it stay as they are, so nobody gets in who could not before. Raises
    RequirementError, with the remedy, where a file can't be seen or opened.
    """
    roots: set[Path] = set()
    for image in images:
        for name in (*image.entrypoint[:1], *image.files, *image.shared):
            _check_visible(Path(name))
        if image.files and image.entrypoint and not Path(image.entrypoint[0]).exists():
            raise RequirementError(
                f"{image.entrypoint[0]}, which image {image.name} runs, is missing: "
                "install Tandem again with `make install`"
            )
        roots |= {Path(name).resolve() for name in image.files}
    opened = sum(_open_to_all(root) for root in sorted(roots) if root.exists())
    if opened:
        progress(ProgressEvent("requirements", f"made {opened} files of the images readable"))


def _check_visible(path: Path) -> None:
    for name in (path, path.resolve()):
        for folder in map(Path, REPLACED):
            if folder in (name, *name.parents):
                raise RequirementError(
                    f"pods need {path}, but see a folder of their own at {folder}: "
                    f"move the checkout, its interpreter or the cache out of {folder}"
                )
        if os.pathsep in str(name):
            raise RequirementError(
                f"pods need {path}, but a path with {os.pathsep!r} can't stand in PATH: rename it"
            )


def _open_to_all(root: Path) -> int:
    """Let every user read a file, or a folder with all that is in it; returns how many changed."""
    changed = 0
    pending = [str(root)]
    while pending:
        path = pending.pop()
        # Bytecode may be written anew, or a cache tidied, while this looks.
        with contextlib.suppress(FileNotFoundError):
            mode = os.stat(path).st_mode
            changed += _open_one(path, mode, root)
            if not stat.S_ISDIR(mode):
                continue
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif not entry.is_symlink():
                        mode = entry.stat(follow_symlinks=False).st_mode
                        changed += _open_one(entry.path, mode, root)
    return changed


def _open_one(path: str, mode: int, root: Path) -> bool:
    enter = stat.S_IXGRP | stat.S_IXOTH if stat.S_ISDIR(mode) or mode & stat.S_IXUSR else 0
    wanted = mode | stat.S_IRGRP | stat.S_IROTH | enter
    if wanted == mode:
        return False
    try:
        os.chmod(path, stat.S_IMODE(wanted))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RequirementError(
            f"pods, which run as user {IMAGE_USER}, can't read {path} ({error.strerror}): "
            f"run `chmod -R go+rX {shlex.quote(str(root))}`, or install somewhere else"
        ) from error
    return True


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
