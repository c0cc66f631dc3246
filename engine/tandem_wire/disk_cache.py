"""Files that are made once per machine and then shared by every process on it."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def default_cache_dir() -> Path:
    """`$TANDEM_CACHE_DIR`, else `~/.cache/tandem`."""
    configured = os.environ.get("TANDEM_CACHE_DIR")
    return Path(configured) if configured else Path.home() / ".cache" / "tandem"


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; it ends with the process, even a killed one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Make `target` with `build(temporary path)` unless it exists; atomic, once across processes.

    Processes that come while another one builds wait for it. A failed or killed build leaves no
    `target`. `build` may make a file or a directory.
    """
    if target.exists():
        return target
    with file_lock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return target
        for leftover in target.parent.glob(f".{target.name}.build-*"):
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.build-", dir=target.parent))
        try:
            build(work / target.name)
            os.replace(work / target.name, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target
