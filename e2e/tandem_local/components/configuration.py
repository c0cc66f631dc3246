"""The files that a cluster's components read: certificates, kubeconfigs, configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tandem_local.components.command_lines import CLIENT_BURST, CLIENT_QPS, CLUSTER_DOMAIN
from tandem_local.components.credentials import Pki, build_pki, write_kubeconfig
from tandem_local.errors import SpecError
from tandem_local.folders import MAX_SOCKET_PATH, ClusterFolder
from tandem_local.nodes.addresses import AddressPlan
from tandem_local.spec import ClusterSpec

DNS_READY_PORT = 8181


def prepare(spec: ClusterSpec, plan: AddressPlan, folder: ClusterFolder) -> None:
    """Write certificates, kubeconfigs and configuration files.

    Raises SpecError if the folder's path is too long for a Unix socket.
    """
    socket = folder.node(len(spec.nodes) - 1).socket
    if len(os.fsencode(socket)) > MAX_SOCKET_PATH:
        raise SpecError(
            f"{socket} is longer than the {MAX_SOCKET_PATH} bytes that a Unix socket's path may "
            "have: set TANDEM_STATE_DIR to a shorter path"
        )
    pki = build_pki(folder.pki, plan, [node.name for node in spec.nodes])
    for path in (folder.config, folder.etcd, folder.logs):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def kubeconfig(path: Path, client: str) -> None:
        write_kubeconfig(
            path,
            cluster=f"tandem-{spec.name}",
            server=plan.api_url,
            ca=pki.ca.cert,
            client=pki.pair(client),
        )

    kubeconfig(folder.kubeconfig, "admin")
    for client in ("kube-controller-manager", "kube-scheduler", "coredns"):
        kubeconfig(folder.config / f"{client}.kubeconfig", client)
    _write(folder.config / "scheduler.yaml", _scheduler_config(folder))
    (folder.config / "Corefile").write_text(_corefile(plan, folder))
    for index, node in enumerate(spec.nodes):
        files = folder.node(index)
        for path in (files.config, files.procri, files.kubelet):
            path.mkdir(parents=True, exist_ok=True)
        kubeconfig(files.config / "kubelet.kubeconfig", f"kubelet-{node.name}")
        kubeconfig(files.config / "kube-proxy.kubeconfig", "kube-proxy")
        (files.config / "resolv.conf").write_text(f"nameserver {plan.dns}\n")
        _write(files.config / "kubelet.yaml", kubelet_config(node.name, index, plan, folder, pki))
        _write(files.config / "kube-proxy.yaml", proxy_config(node.name, index, plan, folder))


def kubelet_config(
    name: str, index: int, plan: AddressPlan, folder: ClusterFolder, pki: Pki
) -> dict[str, Any]:
    """The KubeletConfiguration of a node; it works with cgroup v1 and v2."""
    files, serving = folder.node(index), pki.pair(f"kubelet-{name}")
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": str(plan.node(index)),
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(pki.ca.cert)},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(serving.cert),
        "tlsPrivateKeyFile": str(serving.key),
        "readOnlyPort": 0,
        "healthzBindAddress": "127.0.0.1",
        "clusterDomain": CLUSTER_DOMAIN,
        "clusterDNS": [str(plan.dns)],
        # Otherwise the machine's search domains would reach every pod.
        "resolvConf": str(files.config / "resolv.conf"),
        "containerRuntimeEndpoint": f"unix://{files.socket}",
        "podLogsDir": str(files.root / "pod-logs"),
        "volumePluginDir": str(files.kubelet / "volume-plugins"),
        # Pods are plain processes, and no cgroup of this machine is touched.
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": [],
        "failCgroupV1": False,
        "failSwapOn": False,
        # Nodes without it have no ephemeral storage that a pod could ask for.
        "localStorageCapacityIsolation": True,
        "makeIPTablesUtilChains": False,
        "oomScoreAdj": 0,
        "maxPods": 240,
        "serializeImagePulls": False,
        "imageGCHighThresholdPercent": 100,
        # A developer's machine is often short of disk space, which is no reason to evict pods.
        "evictionHard": {
            "imagefs.available": "0%",
            "nodefs.available": "0%",
            "nodefs.inodesFree": "0%",
        },
    }


def proxy_config(name: str, index: int, plan: AddressPlan, folder: ClusterFolder) -> dict[str, Any]:
    """The KubeProxyConfiguration of a node."""
    kubeconfig = folder.node(index).config / "kube-proxy.kubeconfig"
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "bindAddress": str(plan.node(index)),
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "clusterCIDR": str(plan.pods),
        "hostnameOverride": name,
        "oomScoreAdj": 0,
        # A network namespace can't set the machine's table sizes, and should not.
        "conntrack": {"maxPerCore": 0, "min": 0},
        # The host reaches a ClusterIP through the first node, and the answer of a pod on another
        # node must come back the same way.
        "nftables": {"masqueradeAll": True, "minSyncPeriod": "100ms"},
    }


def _scheduler_config(folder: ClusterFolder) -> dict[str, Any]:
    return {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "leaderElection": {"leaderElect": False},
        "clientConnection": {
            "kubeconfig": str(folder.config / "kube-scheduler.kubeconfig"),
            "qps": CLIENT_QPS,
            "burst": CLIENT_BURST,
        },
    }


def _corefile(plan: AddressPlan, folder: ClusterFolder) -> str:
    kubeconfig = folder.config / "coredns.kubeconfig"
    return f"""\
{CLUSTER_DOMAIN}:53 in-addr.arpa:53 ip6.arpa:53 {{
    errors
    ready {plan.api}:{DNS_READY_PORT}
    kubernetes {CLUSTER_DOMAIN} in-addr.arpa ip6.arpa {{
        kubeconfig {kubeconfig}
        pods insecure
        ttl 5
    }}
}}
# No other zone: there is no way out of the cluster, and CoreDNS says so at once (REFUSED) instead
# of making a resolver wait.
"""


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(document), sort_keys=False))
