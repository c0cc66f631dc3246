"""The cache that processes of different users share."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tandem_wire.disk_cache import build_once, file_lock, shared_folder
from tandem_wire.model_error import CacheFolderError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folders_are_as_open_as_the_cache(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    shared_folder(tmp_path / "a" / "b")
    assert mode(tmp_path / "a") == 0o1777
    assert mode(tmp_path / "a" / "b") == 0o1777


def test_folders_of_a_private_cache_stay_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    shared_folder(tmp_path / "a" / "b")
    assert not mode(tmp_path / "a" / "b") & stat.S_IWOTH


def test_a_lock_file_needs_no_write_permission(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    lock.chmod(0o444)
    with file_lock(lock):
        assert mode(lock) == 0o444


def test_it_is_built_once(tmp_path: Path) -> None:
    built: list[int] = []

    def build(path: Path) -> None:
        built.append(1)
        path.write_text("whole")

    target = tmp_path / "new" / "folder" / "file"
    threads = [threading.Thread(target=build_once, args=(target, build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]
    assert target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir() if "build-" in path.name] == []


def test_folders_of_a_groups_volume_are_the_groups(tmp_path: Path) -> None:
    """A volume with an fsGroup: workers with RDMA run as root, the others as the images' user."""
    tmp_path.chmod(0o2775)
    shared_folder(tmp_path / "a" / "b")
    assert mode(tmp_path / "a" / "b") == 0o2775


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EROFS, "name a folder that this user can write"), (errno.ENOSPC, "free some space")],
)
def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, number: int, remedy: str) -> None:
    def build(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(CacheFolderError, match=f"{tmp_path} can't be written: .*; {remedy}"):
        build_once(tmp_path / "target", build)


def test_a_users_closed_home_is_told() -> None:
    """HOME is / in a container whose image names none, and its user can't write there."""
    code = """if True:
        import os
        from pathlib import Path
        from tandem_wire.disk_cache import build_once, default_cache_dir
        os.setuid(65532)
        try:
            build_once(default_cache_dir() / "x", Path.touch)
        except ValueError as error:
            print(error)
    """
    environment = {**os.environ, "HOME": "/"}
    environment.pop("TANDEM_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("/.cache can't be written: Permission denied; name a folder"), (
        done
    )
