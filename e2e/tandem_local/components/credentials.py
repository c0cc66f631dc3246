"""The certificates of a cluster, new for every cluster, and the kubeconfigs that carry them.

There are three authorities: one for Kubernetes; one for etcd, so that no Kubernetes client
certificate opens it; and one for the API server as a proxy, so that no client can pretend to be
another. Names and groups are those that Kubernetes' own RBAC bootstrap policy expects.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tandem_local.nodes.addresses import AddressPlan

LIFETIME = timedelta(days=365)
# A machine whose clock is a little behind must still accept them.
LEEWAY = timedelta(hours=1)


@dataclass(frozen=True)
class Pair:
    """The files of a certificate and its key."""

    cert: Path
    key: Path


@dataclass(frozen=True)
class Subject:
    """Whom a certificate is for."""

    name: str
    groups: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    addresses: tuple[IPv4Address, ...] = ()
    server: bool = False
    client: bool = True


class Authority:
    """A certificate authority that lives as long as the cluster's folder."""

    def __init__(self, name: str, folder: Path) -> None:
        self.pair = pair_of(folder, name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._cert = (
            _builder(self._name, self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        _write_pair(self.pair, self._key, self._cert)

    def issue(self, file_name: str, subject: Subject) -> Pair:
        """Issue a certificate; its files lie beside the authority's own."""
        key = ec.generate_private_key(ec.SECP256R1())
        groups = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, g) for g in subject.groups]
        name = x509.Name([*groups, x509.NameAttribute(NameOID.COMMON_NAME, subject.name)])
        usages = []
        if subject.server:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        if subject.client:
            usages.append(ExtendedKeyUsageOID.CLIENT_AUTH)
        builder = (
            _builder(name, self._name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        alternatives: list[x509.GeneralName] = [x509.DNSName(dns) for dns in subject.dns]
        alternatives += [x509.IPAddress(address) for address in subject.addresses]
        if alternatives:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        pair = pair_of(self.pair.cert.parent, file_name)
        _write_pair(pair, key, builder.sign(self._key, hashes.SHA256()))
        return pair


@dataclass(frozen=True)
class Pki:
    """Every certificate of a cluster. All files lie in one folder."""

    folder: Path
    nodes: tuple[str, ...] = field(default=())

    def pair(self, name: str) -> Pair:
        """The certificate and key with this file name, such as ``apiserver``."""
        return pair_of(self.folder, name)

    @property
    def ca(self) -> Pair:
        """The Kubernetes authority."""
        return self.pair("ca")

    @property
    def etcd_ca(self) -> Pair:
        """etcd's authority."""
        return self.pair("etcd-ca")

    @property
    def front_proxy_ca(self) -> Pair:
        """The authority that vouches for the API server as a client of aggregated APIs."""
        return self.pair("front-proxy-ca")

    @property
    def service_accounts(self) -> Pair:
        """The key pair that signs service-account tokens; `cert` is the public key."""
        return Pair(self.folder / "sa.pub", self.folder / "sa.key")


def build_pki(folder: Path, plan: AddressPlan, nodes: Sequence[str]) -> Pki:
    """Create the authorities and every certificate that the cluster's components use."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    etcd = Authority("etcd-ca", folder)
    local = IPv4Address("127.0.0.1")
    etcd.issue("etcd", Subject("etcd", dns=("localhost",), addresses=(local,), server=True))
    etcd.issue("apiserver-etcd-client", Subject("kube-apiserver-etcd-client"))

    front = Authority("front-proxy-ca", folder)
    front.issue("front-proxy-client", Subject("front-proxy-client"))

    ca = Authority("ca", folder)
    service = "kubernetes.default.svc"
    ca.issue(
        "apiserver",
        Subject(
            "kube-apiserver",
            dns=(
                "localhost",
                "kubernetes",
                "kubernetes.default",
                service,
                f"{service}.cluster.local",
            ),
            addresses=(local, plan.api, plan.api_service),
            server=True,
            client=False,
        ),
    )
    ca.issue("apiserver-kubelet-client", Subject("kube-apiserver-kubelet-client"))
    ca.issue("admin", Subject("kubernetes-admin", groups=("system:masters",)))
    for component in ("kube-controller-manager", "kube-scheduler", "kube-proxy", "coredns"):
        ca.issue(component, Subject(f"system:{component}"))
    for index, node in enumerate(nodes):
        ca.issue(
            f"kubelet-{node}",
            Subject(
                f"system:node:{node}",
                groups=("system:nodes",),
                dns=(node,),
                addresses=(plan.node(index), local),
                server=True,
            ),
        )
    pki = Pki(folder, tuple(nodes))
    _write_service_account_keys(pki.service_accounts)
    return pki


def pair_of(folder: Path, name: str) -> Pair:
    """The paths of a certificate and its key."""
    return Pair(folder / f"{name}.crt", folder / f"{name}.key")


def write_kubeconfig(path: Path, *, cluster: str, server: str, ca: Path, client: Pair) -> None:
    """Write a kubeconfig with everything embedded, so that the file can be copied anywhere."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": cluster,
                "cluster": {"server": server, "certificate-authority-data": _encode(ca)},
            }
        ],
        "users": [
            {
                "name": cluster,
                "user": {
                    "client-certificate-data": _encode(client.cert),
                    "client-key-data": _encode(client.key),
                },
            }
        ],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": cluster}}],
        "current-context": cluster,
    }
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        yaml.safe_dump(document, file, sort_keys=False)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - LEEWAY)
        .not_valid_after(now + LIFETIME)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not ca,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _write_service_account_keys(pair: Pair) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    _write_private(pair.key, key)
    pair.cert.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


def _write_pair(pair: Pair, key: ec.EllipticCurvePrivateKey, cert: x509.Certificate) -> None:
    _write_private(pair.key, key)
    pair.cert.write_bytes(cert.public_bytes(serialization.Encoding.PEM))


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    data = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _encode(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
