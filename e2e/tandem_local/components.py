"""The processes of a cluster: their command lines and the files these name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tandem_local.addresses import AddressPlan
from tandem_local.binaries import Binaries
from tandem_local.certs import Pki, build_pki
from tandem_local.errors import SpecError
from tandem_local.folders import MAX_SOCKET_PATH, ClusterFolder
from tandem_local.kubeconfig import write_kubeconfig
from tandem_local.network import POD_BRIDGE
from tandem_local.spec import ClusterSpec

CLUSTER_DOMAIN = "cluster.local"
STREAMING_ADDRESS = "127.0.0.1:10010"
DNS_READY_PORT = 8181
# Raised so that a thousand pods are bound by the work and not by client-side throttling.
CLIENT_QPS, CLIENT_BURST = 2000, 4000
# Marks every process of the cluster, so that one can be found that no record names.
MARKER = "TANDEM_CLUSTER_FOLDER"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Component:
    """One process that the supervisor keeps running."""

    name: str
    """What it is: `etcd`, `kubelet`…"""
    node: str
    """The node in whose namespaces it runs."""
    argv: tuple[str, ...]
    """Its command line, without what enters the node."""

    @property
    def key(self) -> str:
        """Unique in the cluster; names the log too."""
        return f"{self.name}-{self.node}"


def environment(folder: ClusterFolder) -> dict[str, str]:
    """The environment of every component; nothing leaks in from the caller's."""
    return {
        "PATH": SEARCH_PATH,
        "HOME": str(folder.root),
        "LANG": "C.UTF-8",
        MARKER: str(folder.root),
    }


def prepare(spec: ClusterSpec, plan: AddressPlan, folder: ClusterFolder) -> None:
    """Write certificates, kubeconfigs and configuration files.

    Raises SpecError where the folder's path is too long for a Unix socket.
    """
    socket = folder.node(len(spec.nodes) - 1).socket
    if len(os.fsencode(socket)) > MAX_SOCKET_PATH:
        raise SpecError(
            f"{socket} is too long for a Unix socket ({MAX_SOCKET_PATH} bytes at most); "
            "set TANDEM_STATE_DIR to a shorter path"
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


def build_components(
    spec: ClusterSpec, plan: AddressPlan, folder: ClusterFolder, binaries: Binaries
) -> list[Component]:
    """Every component of the cluster, in the order in which they start."""
    pki = Pki(folder.pki)
    first = spec.nodes[0].name
    cluster = str(binaries.cluster)
    parts = [
        Component("etcd", first, (cluster, "etcd", *_etcd_flags(folder, pki))),
        Component("kube-apiserver", first, (cluster, "kube-apiserver", *_api_flags(plan, pki))),
    ]
    for index, node in enumerate(spec.nodes):
        flags = _procri_flags(index, plan, folder)
        parts.append(Component("procri", node.name, (cluster, "procri", *flags)))
    manager = _controller_flags(plan, folder, pki)
    parts.append(
        Component("kube-controller-manager", first, (cluster, "kube-controller-manager", *manager))
    )
    scheduler = (cluster, "kube-scheduler", *_scheduler_flags(folder))
    parts.append(Component("kube-scheduler", first, scheduler))
    for index, node in enumerate(spec.nodes):
        flags = _kubelet_flags(node.name, index, plan, folder)
        parts.append(Component("kubelet", node.name, (cluster, "kubelet", *flags)))
    for index, node in enumerate(spec.nodes):
        config = folder.node(index).config / "kube-proxy.yaml"
        parts.append(
            Component("kube-proxy", node.name, (cluster, "kube-proxy", f"--config={config}"))
        )
    corefile = str(folder.config / "Corefile")
    parts.append(Component("coredns", first, (str(binaries.coredns), "-conf", corefile)))
    return parts


def _etcd_flags(folder: ClusterFolder, pki: Pki) -> list[str]:
    etcd = pki.pair("etcd")
    return [
        "--name=tandem",
        f"--data-dir={folder.etcd}",
        "--listen-client-urls=https://127.0.0.1:2379",
        "--advertise-client-urls=https://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--initial-advertise-peer-urls=http://127.0.0.1:2380",
        "--initial-cluster=tandem=http://127.0.0.1:2380",
        "--client-cert-auth",
        f"--trusted-ca-file={pki.etcd_ca.cert}",
        f"--cert-file={etcd.cert}",
        f"--key-file={etcd.key}",
        # The cluster is gone after a crash of the machine in any case.
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def _api_flags(plan: AddressPlan, pki: Pki) -> list[str]:
    serving, etcd = pki.pair("apiserver"), pki.pair("apiserver-etcd-client")
    kubelet, accounts = pki.pair("apiserver-kubelet-client"), pki.service_accounts
    front = pki.pair("front-proxy-client")
    return [
        "--bind-address=0.0.0.0",
        "--secure-port=6443",
        f"--advertise-address={plan.api}",
        f"--service-cluster-ip-range={plan.services}",
        "--allow-privileged=true",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--client-ca-file={pki.ca.cert}",
        f"--tls-cert-file={serving.cert}",
        f"--tls-private-key-file={serving.key}",
        "--etcd-servers=https://127.0.0.1:2379",
        f"--etcd-cafile={pki.etcd_ca.cert}",
        f"--etcd-certfile={etcd.cert}",
        f"--etcd-keyfile={etcd.key}",
        # Aggregated APIs (metrics-server and the like), and what the controllers look up.
        f"--requestheader-client-ca-file={pki.front_proxy_ca.cert}",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={front.cert}",
        f"--proxy-client-key-file={front.key}",
        f"--kubelet-certificate-authority={pki.ca.cert}",
        f"--kubelet-client-certificate={kubelet.cert}",
        f"--kubelet-client-key={kubelet.key}",
        # Node names are in no DNS.
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-issuer=https://kubernetes.default.svc.{CLUSTER_DOMAIN}",
        f"--service-account-key-file={accounts.cert}",
        f"--service-account-signing-key-file={accounts.key}",
        "--profiling=false",
    ]


def _controller_flags(plan: AddressPlan, folder: ClusterFolder, pki: Pki) -> list[str]:
    kubeconfig = folder.config / "kube-controller-manager.kubeconfig"
    return [
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
        "--use-service-account-credentials=true",
        f"--service-account-private-key-file={pki.service_accounts.key}",
        f"--root-ca-file={pki.ca.cert}",
        f"--client-ca-file={pki.ca.cert}",
        f"--cluster-signing-cert-file={pki.ca.cert}",
        f"--cluster-signing-key-file={pki.ca.key}",
        f"--cluster-cidr={plan.pods}",
        f"--service-cluster-ip-range={plan.services}",
        # The nodes' ranges are given by the network that was made before they register.
        "--allocate-node-cidrs=false",
        f"--kube-api-qps={CLIENT_QPS}",
        f"--kube-api-burst={CLIENT_BURST}",
        "--profiling=false",
    ]


def _procri_flags(index: int, plan: AddressPlan, folder: ClusterFolder) -> list[str]:
    files = folder.node(index)
    return [
        f"--socket={files.socket}",
        f"--root={files.procri}",
        f"--images={folder.images}",
        f"--bridge={POD_BRIDGE}",
        f"--pod-cidr={plan.pod_subnet(index)}",
        f"--streaming-address={STREAMING_ADDRESS}",
        f"--dns={plan.dns}",
    ]


def _kubelet_flags(name: str, index: int, plan: AddressPlan, folder: ClusterFolder) -> list[str]:
    files = folder.node(index)
    return [
        f"--config={files.config / 'kubelet.yaml'}",
        f"--kubeconfig={files.config / 'kubelet.kubeconfig'}",
        f"--root-dir={files.kubelet}",
        f"--cert-dir={files.kubelet / 'pki'}",
        f"--hostname-override={name}",
        f"--node-ip={plan.node(index)}",
    ]


def _scheduler_flags(folder: ClusterFolder) -> list[str]:
    kubeconfig = folder.config / "kube-scheduler.kubeconfig"
    return [
        f"--config={folder.config / 'scheduler.yaml'}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--bind-address=127.0.0.1",
    ]


def kubelet_config(
    name: str, index: int, plan: AddressPlan, folder: ClusterFolder, pki: Pki
) -> dict[str, Any]:
    """The KubeletConfiguration of a node, fit for cgroup v1 and v2 alike."""
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
        # Without this the search domains of the machine would reach every pod.
        "resolvConf": str(files.config / "resolv.conf"),
        "containerRuntimeEndpoint": f"unix://{files.socket}",
        "podLogsDir": str(files.root / "pod-logs"),
        "volumePluginDir": str(files.kubelet / "volume-plugins"),
        # Pods are plain processes: no cgroup of this machine is touched.
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": [],
        "failCgroupV1": False,
        "failSwapOn": False,
        "localStorageCapacityIsolation": False,
        "makeIPTablesUtilChains": False,
        "oomScoreAdj": 0,
        "maxPods": 240,
        "serializeImagePulls": False,
        "imageGCHighThresholdPercent": 100,
        # A developer's machine is often short of disk, which is no reason to evict.
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
        # A namespace of its own can't set the machine's table sizes, and should not.
        "conntrack": {"maxPerCore": 0, "min": 0},
        # The host sends to a ClusterIP through the first node: an answer from another node's
        # pod must come back the same way.
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
# of letting a resolver wait.
"""


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(document), sort_keys=False))
