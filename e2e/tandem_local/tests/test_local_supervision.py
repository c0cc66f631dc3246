"""Restarts with a back-off, what a crash leaves behind, and what the machine must have."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from deadlines import patience

from tandem_local import ClusterSpec, ExternalCluster, LocalCluster
from tandem_local.binaries.build import Binaries
from tandem_local.client import Cluster, Commands
from tandem_local.cluster import MAX_RESTARTS, find_dying
from tandem_local.components.command_lines import MARKER, Component
from tandem_local.errors import (
    ClusterNotFound,
    CommandError,
    RequirementError,
    RootRequired,
)
from tandem_local.folders import MAX_SOCKET_PATH, ClusterFolder, cache_dir, clusters_dir, locked
from tandem_local.machine import requirements
from tandem_local.machine.process import ProcessRef, marked
from tandem_local.nodes.addresses import AddressPlan
from tandem_local.progress import silent
from tandem_local.supervision import supervisor
from tandem_local.supervision.state import ClusterState, ComponentState
from tandem_local.supervision.supervisor import Watched
from tandem_local.supervision.teardown import (
    container_records,
    end_processes,
    mounts_below,
    remove_files,
)


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    folder = ClusterFolder(tmp_path / "c")
    folder.logs.mkdir(parents=True)
    return folder


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + patience(30)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def watch(folder: ClusterFolder, *argv: str) -> Watched:
    return Watched(Component("x", "n", argv), ComponentState("x", "n"), [])


def test_a_dead_component_starts_again(folder: ClusterFolder) -> None:
    watched = watch(folder, "sleep", "600")
    watched.start(folder)
    first = watched.state.process
    assert first is not None
    assert not watched.tend(folder)
    first.signal(9)
    until(lambda: watched.tend(folder) and watched.state.process not in (None, first))
    assert watched.state.restarts == 1
    assert watched.state.exit_code == -9
    second = watched.state.process
    assert second is not None
    # The kernel shows a new program's environment a moment after Popen returns.
    until(lambda: second in marked(MARKER, str(folder.root)))
    end_processes(folder, None)
    assert not second.alive(), "found by its marker alone"


def test_the_back_off_grows_and_the_log_is_kept(
    folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(supervisor, "LONGEST_DELAY_S", 0.05)
    watched = watch(folder, "sh", "-c", "echo crashed; exit 3")
    watched.start(folder)
    until(lambda: watched.tend(folder) and watched.state.restarts == 4)
    assert watched.state.exit_code == 3
    until(lambda: (folder.logs / "x-n.log").read_text().count("crashed") == 5)


def test_teardown_ends_what_is_recorded_and_spares_the_rest(folder: ClusterFolder) -> None:
    me = ProcessRef.of(os.getpid())
    assert me is not None
    with (
        subprocess.Popen(["sleep", "600"]) as recorded,
        subprocess.Popen(["sleep", "600"]) as bystander,
        subprocess.Popen(
            ["sleep", "600"], env=os.environ | {MARKER: str(folder.root)}
        ) as unrecorded,
    ):
        ref, spared = ProcessRef.of(recorded.pid), ProcessRef.of(bystander.pid)
        assert ref is not None
        assert spared is not None
        # The bystander has the pid of a component that died long ago.
        recycled = ProcessRef(spared.pid, spared.start - 1)
        state = ClusterState(
            me,
            components=[
                ComponentState("kubelet", "n", ref),
                ComponentState("procri", "n", recycled),
            ],
        )
        records = folder.root / "n0" / "procri" / "containers"
        records.mkdir(parents=True)
        (records / "a.json").write_text(json.dumps({"pid": bystander.pid, "state": "running"}))
        (records / "b.json").write_text('{"pid": ')
        assert len(list(container_records(folder))) == 1
        end_processes(folder, state)
        assert recorded.wait(patience(10)) == unrecorded.wait(patience(10)) == -9
        assert bystander.poll() is None
        bystander.kill()
    assert marked(MARKER, str(folder.root)) == []
    remove_files(folder)
    assert not folder.root.exists()


def test_mounts_are_found_below_a_folder() -> None:
    assert Path("/proc") in mounts_below(Path("/proc"))
    assert mounts_below(Path("/proc/nothing")) == []


def test_folders_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_STATE_DIR", raising=False)
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path / "cache"))
    assert clusters_dir() == tmp_path / "cache" / "clusters"
    monkeypatch.setenv("TANDEM_STATE_DIR", str(tmp_path / "state"))
    folder = ClusterFolder.of("a")
    assert folder.root == tmp_path / "state" / "a"
    assert cache_dir() in folder.lock.parents, "a lock outlives its cluster"
    with locked(folder.lock):
        assert folder.lock.exists()
    assert MAX_SOCKET_PATH < 108


def test_there_is_no_cluster_where_none_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path / "cache"))
    assert LocalCluster.all() == []
    assert not LocalCluster.remove("none")
    with pytest.raises(ClusterNotFound, match="tandem cluster up"):
        LocalCluster.find("none")


def test_a_proxy_of_the_machine_is_kept_out(
    folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.plan.write_text(AddressPlan(IPv4Network("10.222.0.0/16")).to_json())
    folder.spec.write_text(ClusterSpec("c").to_json())
    folder.binaries.write_text(Binaries(Path("/b"), Path("/d")).to_json())
    monkeypatch.setenv("NO_PROXY", "localhost")
    monkeypatch.delenv("no_proxy", raising=False)
    environment = LocalCluster(folder).environment()
    assert environment["NO_PROXY"] == "localhost,10.222.0.0/16"
    assert environment["no_proxy"] == "10.222.0.0/16"
    assert environment["KUBECONFIG"] == str(folder.kubeconfig)


def test_without_root_the_two_other_ways_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(RootRequired, match=r"(?s)--kubeconfig.*tandem serve"):
        LocalCluster.up(ClusterSpec("c"))


def test_missing_commands_are_named_with_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(requirements, "ADMIN_PATH", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RequirementError, match=r"PATH lacks: ip, nft.*apt-get install .*nftables"):
        requirements.check_machine(silent)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in PATH with a kubectl and a helm that print what they are given."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("kubectl", "helm"):
        tool = folder / name
        tool.write_text(
            f'#!/bin/sh\necho "{name} $* $KUBECONFIG"; cat\n'
            'test "$1" != fail || { echo no >&2; exit 4; }\n'
        )
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path / "cache"))
    return folder


def test_an_existing_cluster_is_used_by_its_kubeconfig(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = tmp_path / "kc"
    monkeypatch.delenv("TANDEM_KUBECONFIG", raising=False)
    assert ExternalCluster.from_environment() is None
    monkeypatch.setenv("TANDEM_KUBECONFIG", str(kubeconfig))
    with pytest.raises(
        RequirementError, match=r"no kubeconfig at .*/kc: correct --kubeconfig or TANDEM_KUBECONFIG"
    ):
        ExternalCluster.from_environment()
    kubeconfig.write_text("")
    cluster: Cluster | None = ExternalCluster.from_environment()
    assert cluster is not None
    assert cluster.kubeconfig == kubeconfig
    assert cluster.kubectl("get", "pods").stdout == f"kubectl get pods {kubeconfig}\n"
    assert cluster.helm("list", input="stdin").stdout == f"helm list {kubeconfig}\nstdin"
    assert cluster.kubectl_argv("logs") == [str(tools / "kubectl"), "logs"]
    assert cluster.helm_argv("list") == [str(tools / "helm"), "list"]
    assert str(tmp_path / "cache") in cluster.environment()["HELM_CACHE_HOME"]


def test_a_failed_command_says_what_it_said(tools: Path, tmp_path: Path) -> None:
    commands = Commands(tmp_path / "kc", ["kubectl"], ["helm"])
    with pytest.raises(CommandError, match=r"`kubectl fail` exited with status 4: no") as caught:
        commands.kubectl("fail")
    assert caught.value.returncode == 4
    assert commands.kubectl("fail", check=False).returncode == 4


def test_a_component_that_keeps_dying_ends_the_wait_for_the_cluster() -> None:
    parts = [
        ComponentState("etcd", "node-0", restarts=MAX_RESTARTS - 1),
        ComponentState("procri", "node-1", restarts=MAX_RESTARTS),
    ]
    state = ClusterState(supervisor=ProcessRef(10, 20), components=parts)
    assert find_dying(state) == ["procri on node-1"]
