"""Start, side by side, crash and removal: what is on the machine before and after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem_local import (
    ClusterNotFound,
    ClusterSpec,
    LocalCluster,
    NodeSpec,
    SpecError,
    StartError,
    default_images,
)
from tandem_local.machine.process import namespace

from .conftest import say
from .manifest import eventually, http_server, pod
from .test_cluster_pods import wait_ready

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
IMAGES = default_images(Path(sys.executable).parent)


def footprint() -> dict[str, set[str]]:
    """What a cluster could leave behind: processes' namespaces, mounts, links, routes, folders."""
    namespaces = {
        str(namespace(entry, kind))
        for entry in os.listdir("/proc")
        if entry.isdigit()
        for kind in ("net", "mnt", "pid")
        if namespace(entry, kind)
    }
    ip = ["ip", "-o"]
    links = subprocess.run([*ip, "link"], capture_output=True, text=True, check=True).stdout
    routes = subprocess.run([*ip, "route"], capture_output=True, text=True, check=True).stdout
    rules = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True)
    return {
        "namespaces": namespaces,
        "mounts": set(Path("/proc/self/mountinfo").read_text().splitlines()),
        "links": {line.split(":")[1] for line in links.splitlines()},
        "routes": set(routes.splitlines()),
        "firewall": {rules.stdout},
        "folders": {
            str(path)
            for parent in ("/var/lib", "/var/log", "/run", "/etc", "/usr/libexec", "/root", "/tmp")
            for path in Path(parent).glob("*")
            if path.name.startswith(("kube", "cni", "containers", "netns", "tandem", ".kube"))
        },
        "tunables": {
            path.read_text()
            for path in (
                Path("/proc/sys/vm/overcommit_memory"),
                Path("/proc/sys/kernel/panic"),
                Path("/proc/sys/kernel/panic_on_oops"),
            )
        },
    }


def kill(pid: int) -> None:
    """SIGKILL, and wait until it has taken effect."""
    os.kill(pid, signal.SIGKILL)
    eventually(f"{pid} is dead", lambda: not Path(f"/proc/{pid}").exists())


@pytest.fixture
def name() -> Iterator[str]:
    name = f"life-{os.getpid()}"
    yield name
    LocalCluster.remove(name)


def test_down_leaves_nothing(name: str) -> None:
    before = footprint()
    cluster = LocalCluster.up(ClusterSpec(name, images=IMAGES), say)
    secret = {"name": "s", "secret": {"secretName": "s"}}
    cluster.kubectl("create", "secret", "generic", "s", "--from-literal=k=v")
    cluster.kubectl(
        "apply",
        "-f",
        "-",
        input=pod(
            "web",
            f"sleep 900 & {http_server(80)}",
            volumes=[secret, {"name": "m", "emptyDir": {"medium": "Memory"}}],
            container={
                "volumeMounts": [
                    {"name": "s", "mountPath": "/mnt"},
                    {"name": "m", "mountPath": "/media"},
                ]
            },
        ),
    )
    wait_ready(cluster, "default", "web")
    pids = cluster.container_pids("default", "web")
    assert pids
    cluster.down()
    after = footprint()
    for part, held in before.items():
        assert after[part] - held == set(), part
        if part != "namespaces":
            assert held - after[part] == set(), part
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not cluster.kubeconfig.parent.exists()
    with pytest.raises(ClusterNotFound):
        LocalCluster.find(name)
    assert not LocalCluster.remove(name), "a second removal finds nothing"


def test_up_takes_a_live_cluster_and_cleans_a_crashed_one(name: str) -> None:
    spec = ClusterSpec(name, images=IMAGES)
    first = LocalCluster.up(spec, say)
    again = LocalCluster.up(spec, say)
    assert again.status().supervisor_pid == first.status().supervisor_pid
    assert name in [cluster.name for cluster in LocalCluster.all()]
    with pytest.raises(SpecError, match="already running with different nodes"):
        LocalCluster.up(ClusterSpec(name, (NodeSpec("other"),)), say)

    first.kubectl("apply", "-f", "-", input=pod("p", "sleep 900 & sleep 901"))
    wait_ready(first, "default", "p")
    orphans = [c.pid for c in first.status().components if c.pid is not None]
    orphans += first.container_pids("default", "p")
    kill(first.status().supervisor_pid)
    with pytest.raises(ClusterNotFound):
        LocalCluster.find(name)
    assert all(Path(f"/proc/{pid}").exists() for pid in orphans), "nothing has ended them"

    second = LocalCluster.up(spec, say)
    assert not any(Path(f"/proc/{pid}").exists() for pid in orphans)
    assert second.kubectl("get", "pods", "-o", "name").stdout == "", "a new cluster, not the old"
    kill(second.status().supervisor_pid)
    second.down()
    assert not second.kubeconfig.parent.exists()


def test_a_cluster_that_cannot_start_says_why_and_ends(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\necho "$1 is broken"\nexit 3\n')
    broken.chmod(0o755)
    for variable in ("TANDEM_CLUSTER_BINARY", "TANDEM_COREDNS_BINARY"):
        monkeypatch.setenv(variable, str(broken))
    before = footprint()
    with pytest.raises(StartError, match="kube-apiserver is broken") as told:
        LocalCluster.up(ClusterSpec(name), say)
    assert "can't start, because " in str(told.value)
    assert "ended again and again" in str(told.value)
    assert footprint()["links"] == before["links"]
    LocalCluster.remove(name)


def test_two_clusters_side_by_side(local_cluster: LocalCluster, name: str) -> None:
    other = LocalCluster.up(ClusterSpec(name, images=IMAGES), say)
    assert not other.addresses.pods.overlaps(local_cluster.addresses.pods)
    assert not other.addresses.services.overlaps(local_cluster.addresses.services)
    uids = {
        cluster.kubectl("get", "ns", "kube-system", "-o", "jsonpath={.metadata.uid}").stdout
        for cluster in (other, local_cluster)
    }
    assert len(uids) == 2
    other.kubectl("apply", "-f", "-", input=pod("here", "sleep 600"))
    wait_ready(other, "default", "here")
    missing = local_cluster.kubectl("get", "pod", "here", check=False)
    assert missing.returncode != 0
    other.down()
    eventually(
        "the other one lives on",
        lambda: local_cluster.kubectl("get", "nodes", check=False).returncode == 0,
    )
