"""Files that are made once per machine and then shared by every process on it."""

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tandem_wire.model_error import CacheFolderError

_WRITABLE: Final = "name a folder that this user can write, with --cache-dir or TANDEM_CACHE_DIR"
_ROOMIER: Final = "free some space, or name another folder with --cache-dir or TANDEM_CACHE_DIR"
_REMEDIES: Final = {
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EROFS: _WRITABLE,
    errno.ENOSPC: _ROOMIER,
    errno.EDQUOT: _ROOMIER,
}


def default_cache_dir() -> Path:
    """`$TANDEM_CACHE_DIR`, else `~/.cache/tandem`."""
    configured = os.environ.get("TANDEM_CACHE_DIR")
    return Path(configured) if configured else Path.home() / ".cache" / "tandem"


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; it ends with the process, even a killed one."""
    shared_folder(path.parent)
    descriptor = _open_lock(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def shared_folder(path: Path) -> None:
    """Make `path` and its missing parents, as open as the first parent that exists.

    Pods of different users share one cache: what one of them makes in a folder like /tmp, the
    others must be able to use. In a volume with a group of its own (fsGroup) it is the group.
    """
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    mode = stat.S_IMODE(path.stat().st_mode)
    for folder in reversed(missing):
        try:
            folder.mkdir()
        except FileExistsError:  # another process was quicker
            continue
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            folder.chmod(mode)


def _open_lock(path: Path) -> int:
    """A descriptor that can be locked; reading is enough, and another user's file allows no more.

    The two ways are kept apart because Linux refuses O_CREAT on another user's file in a folder
    like /tmp (`fs.protected_regular`).
    """
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        try:
            return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            continue


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Make `target` with `build(temporary path)` unless it exists; atomic, once across processes.

    Processes that come while another one builds wait for it. A failed or killed build leaves no
    `target`. `build` may make a file or a directory. Folders above it are made as needed.

    Raises CacheFolderError when the folder can't be written, or is full.
    """
    if target.exists():
        return target
    try:
        _build_locked(target, build)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        place = error.filename or target.parent
        raise CacheFolderError(f"{place} can't be written: {error.strerror}", remedy) from error
    return target


def _build_locked(target: Path, build: Callable[[Path], None]) -> None:
    with file_lock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return
        for leftover in target.parent.glob(f".{target.name}.build-*"):
            # A leftover of another user can't be removed, and does no harm.
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.build-", dir=target.parent))
        try:
            build(work / target.name)
            os.replace(work / target.name, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
