"""What a worker's container gives it: cores by quota, and a compiler for Triton."""

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tandem_engine.errors import ConfigError
from tandem_engine.load.compiler import check_compiler
from tandem_engine.load.cores import count_cores

V2 = "sys/fs/cgroup/{}cpu.max"
V1 = "sys/fs/cgroup/cpu/{}cpu.cfs_{}_us"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({V2.format(""): "max 100000\n"}, 16),
        ({V2.format(""): "200000 100000\n"}, 2),
        ({V2.format(""): "250000 100000\n"}, 3),
        ({V2.format(""): "10000 100000\n"}, 1),
        ({V2.format(""): "3200000 100000\n"}, 16),
        # Without a namespace of its own: the group's limit, and the one around it.
        ({"proc/self/cgroup": "0::/pods/a\n", V2.format("pods/a/"): "400000 100000\n"}, 4),
        (
            {
                "proc/self/cgroup": "0::/pods/a\n",
                V2.format("pods/a/"): "400000 100000\n",
                V2.format("pods/"): "300000 100000\n",
            },
            3,
        ),
        ({V1.format("", "quota"): "-1\n", V1.format("", "period"): "100000\n"}, 16),
        ({V1.format("", "quota"): "150000\n", V1.format("", "period"): "50000\n"}, 3),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/pod\n1:name=systemd:/\n",
                V1.format("pod/", "quota"): "200000\n",
                V1.format("pod/", "period"): "100000\n",
            },
            2,
        ),
    ],
)
def test_threads_follow_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert count_cores(machine(tmp_path, files)) == cores


def test_a_worker_on_a_cpu_takes_the_quotas_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from tandem_engine.load import rank

    for name in ("OMP_NUM_THREADS", "TANDEM_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rank, "count_cores", lambda: 6)
    before = torch.get_num_threads()
    try:
        rank._limit_threads(2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def fake_compiler(folder: Path, script: str) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / "gcc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "gcc").chmod(0o755)
    return {"PATH": str(folder)}


def test_without_a_compiler_a_gpu_worker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no C compiler, .*: install gcc, libc6-dev"):
        check_compiler(tmp_path, {"PATH": str(tmp_path)})


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CC is nothing-like-it, and there is no such program"):
        check_compiler(tmp_path, {"PATH": str(tmp_path), "CC": "nothing-like-it"})


def test_a_compiler_without_headers_is_told(tmp_path: Path) -> None:
    environ = fake_compiler(
        tmp_path / "bin", "echo 'x.c:1:10: fatal error: Python.h: No such file' >&2; exit 1"
    )
    with pytest.raises(ConfigError, match=r"\(x.c:1:10: fatal error: Python.h: No such file\)"):
        check_compiler(tmp_path / "cache", environ)


def test_a_cache_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"can't be written .*: set TRITON_CACHE_DIR"):
        check_compiler(tmp_path / "file" / "triton", {"PATH": str(tmp_path)})


def test_a_whole_compiler_passes_and_leaves_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environ = fake_compiler(tmp_path / "bin", 'echo "$@" > "$0.told"')
    check_compiler(cache, environ)
    told = (tmp_path / "bin" / "gcc.told").read_text()
    assert f"-I{sysconfig.get_paths()['include']}" in told
    assert list(cache.iterdir()) == []


def test_this_machines_compiler_is_really_asked(tmp_path: Path) -> None:
    source = tmp_path / "x.c"
    source.write_text("#include <Python.h>\n")
    has_one, include = "/usr/bin:/bin", sysconfig.get_paths()["include"]
    works = subprocess.run(
        ["sh", "-c", f"PATH={has_one} gcc -I{include} -c {source} -o {tmp_path}/x.o"], check=False
    )
    if works.returncode:
        with pytest.raises(ConfigError):
            check_compiler(tmp_path, {"PATH": has_one})
    else:
        check_compiler(tmp_path, {"PATH": has_one})
