"""Address ranges: one /16 per cluster, so that several clusters can stand side by side.

The lower half of 10.X.0.0/16 is for pods (one /24 per node), 10.X.128.0/18 is for Services, and
10.X.255.0/24 is the fabric, the network that joins nodes and host.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from tandem_local.errors import RequirementError

# Away from the ranges that kubeadm, kind, k3s and Docker use by default.
CANDIDATES = tuple(IPv4Network(f"10.{second}.0.0/16") for second in range(200, 244))


@dataclass(frozen=True)
class AddressPlan:
    """The addresses of a cluster; all of them follow from its /16."""

    base: IPv4Network

    @property
    def pods(self) -> IPv4Network:
        """The range of all pods."""
        return next(self.base.subnets(new_prefix=17))

    @property
    def services(self) -> IPv4Network:
        """The range of ClusterIPs."""
        return IPv4Network((int(self.base.network_address) + (128 << 8), 18))

    @property
    def fabric(self) -> IPv4Network:
        """The network that joins nodes and host."""
        return IPv4Network((int(self.base.network_address) + (255 << 8), 24))

    @property
    def host(self) -> IPv4Address:
        """The host's address in the fabric, which pods reach."""
        return self.fabric[254]

    @property
    def api_service(self) -> IPv4Address:
        """The ClusterIP of the Service `kubernetes`."""
        return self.services[1]

    @property
    def dns(self) -> IPv4Address:
        """The ClusterIP of the cluster's DNS server."""
        return self.services[10]

    @property
    def api(self) -> IPv4Address:
        """The address at which the API server listens: the first node's."""
        return self.node(0)

    @property
    def api_url(self) -> str:
        """The API server's URL."""
        return f"https://{self.api}:6443"

    def node(self, index: int) -> IPv4Address:
        """The node's address in the fabric."""
        return self.fabric[index + 1]

    def pod_subnet(self, index: int) -> IPv4Network:
        """The /24 of the node's pods."""
        return IPv4Network((int(self.base.network_address) + (index << 8), 24))

    def pod_gateway(self, index: int) -> IPv4Address:
        """The node's own address in its pod subnet."""
        return self.pod_subnet(index)[1]

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps({"base": str(self.base)})

    @classmethod
    def from_json(cls, text: str) -> AddressPlan:
        """The inverse of `to_json`."""
        return cls(IPv4Network(json.loads(text)["base"]))


def choose_plan(taken: Iterable[IPv4Network], cluster: str = "") -> AddressPlan:
    """The first candidate that overlaps with nothing in `taken`.

    Where the search begins depends on the cluster's name. Two clusters that start at the same
    moment with separate caches can't know of each other, and so hardly ever choose the same range.
    Raises RequirementError if every candidate is taken.
    """
    busy = [network for network in taken if network.prefixlen > 0]
    first = zlib.crc32(cluster.encode()) % len(CANDIDATES) if cluster else 0
    for candidate in (*CANDIDATES[first:], *CANDIDATES[:first]):
        if not any(candidate.overlaps(network) for network in busy):
            return AddressPlan(candidate)
    raise RequirementError(
        f"no address range is free: each one from {CANDIDATES[0]} to {CANDIDATES[-1]} overlaps "
        "with a route of this machine: remove a cluster (`tandem cluster down`) or a route"
    )
