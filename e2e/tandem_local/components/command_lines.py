"""The processes of a cluster, and their command lines."""

from __future__ import annotations

from dataclasses import dataclass

from tandem_local.binaries.build import Binaries
from tandem_local.components.credentials import Pki
from tandem_local.folders import ClusterFolder
from tandem_local.nodes.addresses import AddressPlan
from tandem_local.nodes.network import POD_BRIDGE
from tandem_local.spec import ClusterSpec

CLUSTER_DOMAIN = "cluster.local"
STREAMING_ADDRESS = "127.0.0.1:10010"
# Raised so that with a thousand pods the work sets the pace, not client-side throttling.
CLIENT_QPS, CLIENT_BURST = 2000, 4000
# Marks every process of the cluster, so that even one that no record names can be found.
MARKER = "TANDEM_CLUSTER_FOLDER"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Component:
    """One process that the supervisor keeps running."""

    name: str
    """What runs: `etcd`, `kubelet`…"""
    node: str
    """The node in whose namespaces it runs."""
    argv: tuple[str, ...]
    """Its command line, without the prefix that enters the node."""

    @property
    def key(self) -> str:
        """Its name in the cluster, which is unique and also names its log."""
        return f"{self.name}-{self.node}"


def environment(folder: ClusterFolder) -> dict[str, str]:
    """The environment of every component; nothing of the caller's environment leaks in."""
    return {
        "PATH": SEARCH_PATH,
        "HOME": str(folder.root),
        "LANG": "C.UTF-8",
        MARKER: str(folder.root),
    }


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
        # If the machine crashes, the cluster is gone in any case.
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
        # For aggregated APIs (metrics-server and the like), and for what the controllers look up.
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
        # No DNS server knows the nodes' names.
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
        # The nodes' ranges come from the network, which exists before they register.
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
        f"--cdi={files.cdi}",
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
