"""Fixtures of the end-to-end suites: a cluster, and namespaces in it.

The embedded cluster is started once per session, unless TANDEM_KUBECONFIG names one that exists.
"""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem_local import (
    Cluster,
    ClusterSpec,
    ExternalCluster,
    LocalCluster,
    NodeSpec,
    ProgressEvent,
    default_images,
)
from tandem_local.folders import clusters_dir

ROOT = Path(__file__).resolve().parents[2]
# Two sessions on one machine must not share a cluster: one of them may disturb it.
CLUSTER_NAME = os.environ.get("TANDEM_TEST_CLUSTER", f"e2e-{os.getpid()}")
# What examples/ ask of a node with GPUs.
GPU_NODE_LABELS = {"example.com/fabric": "rail-0", "example.com/pool": "gpu"}

# Devices of a plugin, of EFA, of SR-IOV and of a network of GKE.
FABRIC = dict.fromkeys(
    (
        *("rdma/ib", "vpc.amazonaws.com/efa", "openshift.io/rail0"),
        "networking.gke.io.networks/rdma-0",
    ),
    "16",
)


def say(event: ProgressEvent) -> None:
    """Progress that pytest shows if a start fails."""
    if event.done is None:
        print(f"{event.stage}: {event.message}")


def remove_abandoned() -> None:
    """Remove the clusters of test sessions that were killed."""
    for folder in clusters_dir().glob("*-*"):
        owner = re.fullmatch(r"(?:e2e|life)-(\d+)", folder.name)
        if owner and not Path("/proc", owner[1]).exists():
            LocalCluster.remove(folder.name)


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[LocalCluster]:
    """An embedded cluster of two nodes; the first offers GPUs and RDMA devices."""
    remove_abandoned()
    spec = ClusterSpec(
        CLUSTER_NAME,
        (
            NodeSpec("node-0", {"nvidia.com/gpu": "16", **FABRIC}, GPU_NODE_LABELS),
            NodeSpec("node-1", {"vpc.amazonaws.com/efa": "16"}),
        ),
        default_images(Path(sys.executable).parent),
    )
    running = LocalCluster.up(spec, say)
    yield running
    running.down()


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """The cluster that TANDEM_KUBECONFIG names, or else the embedded one."""
    named = ExternalCluster.from_environment()
    if named is not None:
        return named
    embedded: LocalCluster = request.getfixturevalue("local_cluster")
    return embedded


@pytest.fixture(scope="session")
def tandem(cluster: Cluster) -> Cluster:
    """The cluster with the operator installed by the real helm."""
    cluster.helm(
        *("upgrade", "--install", "tandem", str(ROOT / "charts" / "tandem")),
        *("--namespace", "tandem-system", "--create-namespace", "--wait", "--timeout", "180s"),
    )
    return cluster


@pytest.fixture
def namespace(local_cluster: LocalCluster) -> Iterator[str]:
    """A namespace of the embedded cluster for one test."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    local_cluster.kubectl("create", "namespace", name)
    yield name
    local_cluster.kubectl("delete", "namespace", name, "--wait=false")
