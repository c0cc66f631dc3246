"""The cache that processes of different users share."""

import stat
import threading
from pathlib import Path

from tandem_wire.disk_cache import build_once, file_lock, shared_folder


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
