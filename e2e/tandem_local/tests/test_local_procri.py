"""The container runtime's own tests, in Go: `go vet` and `go test` of e2e/cluster/procri."""

import os
import subprocess
from pathlib import Path

import pytest

from tandem_local.binaries.build import source_dir
from tandem_local.binaries.toolchain import find_go, required_version

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1500)]


def run_go(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Go in e2e/cluster, with the flags of the real build, whose compiled packages it shares."""
    sources = source_dir()
    go = find_go(required_version(sources / "go.mod"))
    flags = {"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false -trimpath"}
    return subprocess.run(
        [str(go), *arguments],
        cwd=Path(sources),
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        check=False,
    )


def test_go_vet() -> None:
    done = run_go("vet", "./procri/...")
    assert done.returncode == 0, done.stderr


def test_go_test() -> None:
    done = run_go("test", "-count=1", "./procri/...")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok" in done.stdout
