"""Certificates, verified the way a TLS peer verifies them."""

from __future__ import annotations

import stat
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from tandem_local.components.credentials import Pki, build_pki, write_kubeconfig
from tandem_local.nodes.addresses import AddressPlan

PLAN = AddressPlan(IPv4Network("10.201.0.0/16"))
NODES = ("node-0", "node-1")
CLIENTS = (
    "admin",
    "apiserver-kubelet-client",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "coredns",
    "kubelet-node-0",
    "kubelet-node-1",
)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return build_pki(tmp_path_factory.mktemp("pki"), PLAN, NODES)


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def policy(ca: Path) -> PolicyBuilder:
    return PolicyBuilder().store(Store([load(ca)])).time(datetime.now(UTC))


def subject(certificate: x509.Certificate, field: x509.ObjectIdentifier) -> list[str | bytes]:
    return [attribute.value for attribute in certificate.subject.get_attributes_for_oid(field)]


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("apiserver", x509.IPAddress(PLAN.api)),
        ("apiserver", x509.IPAddress(PLAN.api_service)),
        ("apiserver", x509.DNSName("kubernetes.default.svc.cluster.local")),
        ("kubelet-node-0", x509.IPAddress(PLAN.node(0))),
        ("kubelet-node-1", x509.IPAddress(PLAN.node(1))),
    ],
)
def test_servers_are_who_they_are_called(
    pki: Pki, name: str, peer: x509.IPAddress | x509.DNSName
) -> None:
    policy(pki.ca.cert).build_server_verifier(peer).verify(load(pki.pair(name).cert), [])


def test_a_server_is_nobody_else(pki: Pki) -> None:
    verifier = policy(pki.ca.cert).build_server_verifier(x509.IPAddress(IPv4Address("10.9.9.9")))
    with pytest.raises(VerificationError):
        verifier.verify(load(pki.pair("apiserver").cert), [])


def test_etcd_is_closed_to_kubernetes_clients(pki: Pki) -> None:
    certificate = load(pki.pair("admin").cert)
    with pytest.raises((ValueError, InvalidSignature)):
        certificate.verify_directly_issued_by(load(pki.etcd_ca.cert))
    load(pki.pair("apiserver-etcd-client").cert).verify_directly_issued_by(load(pki.etcd_ca.cert))


@pytest.mark.parametrize("name", CLIENTS)
def test_clients_are_issued_by_the_cluster(pki: Pki, name: str) -> None:
    certificate = load(pki.pair(name).cert)
    certificate.verify_directly_issued_by(load(pki.ca.cert))
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH in usage
    key = load_pem_private_key(pki.pair(name).key.read_bytes(), None)
    assert key.public_key() == certificate.public_key()


def test_names_and_groups_are_those_of_the_rbac_bootstrap_policy(pki: Pki) -> None:
    node = load(pki.pair("kubelet-node-1").cert)
    assert subject(node, NameOID.COMMON_NAME) == ["system:node:node-1"]
    assert subject(node, NameOID.ORGANIZATION_NAME) == ["system:nodes"]
    admin = load(pki.pair("admin").cert)
    assert subject(admin, NameOID.ORGANIZATION_NAME) == ["system:masters"]
    assert not subject(load(pki.pair("kube-proxy").cert), NameOID.ORGANIZATION_NAME)


def test_private_keys_are_private(pki: Pki) -> None:
    keys = list(pki.folder.glob("*.key"))
    assert len(keys) >= len(CLIENTS)
    assert all(stat.S_IMODE(key.stat().st_mode) == 0o600 for key in keys)


def test_service_account_keys_belong_together(pki: Pki) -> None:
    private = load_pem_private_key(pki.service_accounts.key.read_bytes(), None)
    assert private.public_key() == load_pem_public_key(pki.service_accounts.cert.read_bytes())


def test_a_kubeconfig_holds_all_that_a_client_needs(pki: Pki, tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    write_kubeconfig(
        path, cluster="c", server="https://10.0.0.1:6443", ca=pki.ca.cert, client=pki.pair("admin")
    )
    document = yaml.safe_load(path.read_text())
    assert document["current-context"] == "c"
    assert document["clusters"][0]["cluster"]["server"] == "https://10.0.0.1:6443"
    assert set(document["users"][0]["user"]) == {"client-certificate-data", "client-key-data"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
