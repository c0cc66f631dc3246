"""Components are killed one by one; the cluster recovers and the pods keep running."""

from __future__ import annotations

import pytest

from tandem_local import LocalCluster

from .manifest import eventually, pod
from .test_cluster_pods import pod_field, wait_ready

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def resources(cluster: LocalCluster) -> str:
    return cluster.kubectl(
        "get",
        "node",
        "node-0",
        "-o",
        r"jsonpath={.status.allocatable.nvidia\.com/gpu}",
        check=False,
    ).stdout


def came_back(cluster: LocalCluster, component: str, node: str, old: int) -> bool:
    [found] = [c for c in cluster.status().components if (c.name, c.node) == (component, node)]
    return found.pid is not None and found.pid != old


@pytest.mark.parametrize(
    "component",
    [
        "kube-apiserver",
        "etcd",
        "kube-scheduler",
        "kube-controller-manager",
        "kubelet",
        "kube-proxy",
    ],
)
def test_a_killed_component_comes_back(
    local_cluster: LocalCluster, namespace: str, component: str
) -> None:
    cluster = local_cluster
    gpus = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    cluster.kubectl(
        "apply", "-n", namespace, "-f", "-", input=pod("before", "sleep 600", container=gpus)
    )
    wait_ready(cluster, namespace, "before")
    [pid] = cluster.container_pids(namespace, "before")

    old = cluster.kill(component, "node-0")
    eventually(f"{component} runs again", lambda: came_back(cluster, component, "node-0", old))
    eventually("the API answers", lambda: cluster.kubectl("get", "ns", check=False).returncode == 0)
    eventually("the node offers its GPUs", lambda: resources(cluster) == "16")

    # A new pod goes through API server, scheduler, controllers (its service account) and kubelet.
    cluster.kubectl(
        "apply", "-n", namespace, "-f", "-", input=pod("after", "sleep 600", container=gpus)
    )
    wait_ready(cluster, namespace, "after")
    assert cluster.container_pids(namespace, "before") == [pid], "the old pod was not touched"
    assert pod_field(cluster, namespace, "before", ".status.phase") == "Running"
    assert (
        pod_field(cluster, namespace, "before", ".status.containerStatuses[0].restartCount") == "0"
    )


def test_pods_come_back_after_the_death_of_the_runtime(
    local_cluster: LocalCluster, namespace: str
) -> None:
    cluster = local_cluster
    cluster.kubectl(
        "apply", "-n", namespace, "-f", "-", input=pod("p", "sleep 600", nodeName="node-1")
    )
    wait_ready(cluster, namespace, "p")
    [pid] = cluster.container_pids(namespace, "p")
    old = cluster.kill("procri", "node-1")
    eventually("procri runs again", lambda: came_back(cluster, "procri", "node-1", old))
    eventually(
        "the pod has a new process",
        lambda: [p for p in cluster.container_pids(namespace, "p") if p != pid] != [],
        timeout_s=120,
    )
    wait_ready(cluster, namespace, "p")
