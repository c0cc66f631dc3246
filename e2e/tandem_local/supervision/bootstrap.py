"""The objects that a cluster has from the start, and what is kept true of its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem_local.nodes.addresses import AddressPlan
from tandem_local.spec import NodeSpec, parse_quantity
from tandem_local.supervision.api import ApiClient

RBAC = "/apis/rbac.authorization.k8s.io/v1"


def bootstrap_objects(plan: AddressPlan) -> list[tuple[str, dict[str, Any]]]:
    """(collection path, object): the rights of kubelet client and CoreDNS, and the DNS Service."""
    return [
        (
            f"{RBAC}/clusterrolebindings",
            _binding(
                "tandem:kubelet-api-admin",
                "system:kubelet-api-admin",
                "kube-apiserver-kubelet-client",
            ),
        ),
        (
            f"{RBAC}/clusterroles",
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "ClusterRole",
                "metadata": {"name": "system:coredns"},
                "rules": [
                    {
                        "apiGroups": [""],
                        "resources": ["services", "namespaces"],
                        "verbs": ["list", "watch"],
                    },
                    {
                        "apiGroups": ["discovery.k8s.io"],
                        "resources": ["endpointslices"],
                        "verbs": ["list", "watch"],
                    },
                ],
            },
        ),
        (
            f"{RBAC}/clusterrolebindings",
            _binding("system:coredns", "system:coredns", "system:coredns"),
        ),
        ("/api/v1/namespaces/kube-system/services", _dns_service(plan)),
        (
            "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices",
            _dns_endpoints(plan),
        ),
    ]


def reconcile_node(api: ApiClient, spec: NodeSpec, pod_subnet: str) -> bool:
    """Make a node's labels, pod range and extended resources match the spec.

    Returns whether the node is Ready and already matched. A kubelet that registers again sets
    extended resources to 0, so this runs for as long as the cluster does.
    """
    path = f"/api/v1/nodes/{spec.name}"
    node = api.get(path)
    if node is None:
        return False
    change = missing_metadata(node, spec, pod_subnet)
    if change:
        api.patch(path, change)
    capacity = missing_resources(node, spec)
    if capacity:
        api.patch(f"{path}/status", {"status": {"capacity": capacity, "allocatable": capacity}})
    return not change and not capacity and is_ready(node)


def missing_metadata(
    node: Mapping[str, Any], spec: NodeSpec, pod_subnet: str
) -> dict[str, Any] | None:
    """The merge patch that gives the node its labels and pod range; None if it has them."""
    have = node["metadata"].get("labels") or {}
    labels = {key: value for key, value in spec.labels.items() if have.get(key) != value}
    patch: dict[str, Any] = {}
    if labels:
        patch["metadata"] = {"labels": labels}
    if not (node.get("spec") or {}).get("podCIDR"):
        patch["spec"] = {"podCIDR": pod_subnet, "podCIDRs": [pod_subnet]}
    return patch or None


def missing_resources(node: Mapping[str, Any], spec: NodeSpec) -> dict[str, str]:
    """The extended resources whose amounts in the node's status differ from the spec."""
    status = node.get("status") or {}
    return {
        name: amount
        for name, amount in spec.resources.items()
        if any(
            parse_quantity((status.get(part) or {}).get(name, "0")) != parse_quantity(amount)
            for part in ("capacity", "allocatable")
        )
    }


def is_ready(node: Mapping[str, Any]) -> bool:
    """Whether the Node object's condition Ready is true."""
    conditions = (node.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _binding(name: str, role: str, user: str) -> dict[str, Any]:
    group = "rbac.authorization.k8s.io"
    return {
        "apiVersion": f"{group}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
    }


def _dns_service(plan: AddressPlan) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "labels": {"k8s-app": "kube-dns"}},
        "spec": {
            "clusterIP": str(plan.dns),
            "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP"},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
            ],
        },
    }


def _dns_endpoints(plan: AddressPlan) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "kube-dns",
            "labels": {
                "kubernetes.io/service-name": "kube-dns",
                "endpointslice.kubernetes.io/managed-by": "tandem-local",
            },
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [str(plan.api)], "conditions": {"ready": True}}],
        "ports": [
            {"name": "dns", "port": 53, "protocol": "UDP"},
            {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
        ],
    }
