"""The network between the nodes' namespaces and the host.

The first node has a bridge, the *fabric*, to which veths connect the other nodes and the host.
Every node has a second bridge for its pods, and a route to the pods of every other node. The host
has routes to pods and Services, so it reaches both as a pod would.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import subprocess
from collections.abc import Sequence
from ipaddress import IPv4Network
from pathlib import Path

from tandem_local.errors import LocalError
from tandem_local.nodes.addresses import AddressPlan

POD_BRIDGE = "pods"
FABRIC = "fabric"


def host_link(folder: Path) -> str:
    """The name (at most 15 characters) of the host's veth for the cluster in `folder`."""
    return "tdm" + hashlib.sha256(os.fsencode(folder)).hexdigest()[:10]


def host_networks() -> list[IPv4Network]:
    """Every IPv4 range that the host has a route to or an address in, except default routes."""
    routes = json.loads(_ip("-j", "-4", "route", "show", "table", "all") or "[]")
    networks = []
    for route in routes:
        if route["dst"] != "default":
            networks.append(ipaddress.IPv4Network(route["dst"], strict=False))
    return networks


def connect(folder: Path, plan: AddressPlan, holders: Sequence[int]) -> None:
    """Connect the nodes to each other and to the host. The host's firewall is not touched."""
    first = holders[0]
    for index, holder in enumerate(holders):
        subnet = plan.pod_subnet(index)
        batch = ["link set lo up"]
        if index == 0:
            batch += [f"link add {FABRIC} address {_mac(0, index)} type bridge"]
        else:
            batch += [f"link add {FABRIC} address {_mac(0, index)} type veth peer name n{index}"]
            batch += [f"link set n{index} netns {first}"]
        batch += [
            f"addr add {plan.node(index)}/{plan.fabric.prefixlen} dev {FABRIC}",
            f"link set {FABRIC} up",
            # A bridge without a fixed MAC takes that of its lowest port: pods would lose it.
            f"link add {POD_BRIDGE} address {_mac(1, index)} type bridge",
            f"addr add {plan.pod_gateway(index)}/{subnet.prefixlen} dev {POD_BRIDGE}",
            f"link set {POD_BRIDGE} up",
            # kube-proxy rewrites packets to a Service, but only if the kernel has a route.
            f"route add {plan.services} dev {FABRIC}",
        ]
        batch += [
            f"route add {plan.pod_subnet(other)} via {plan.node(other)}"
            for other in range(len(holders))
            if other != index
        ]
        _ip_batch(batch, inside=holder)
        if index > 0:
            _ip_batch([f"link set n{index} master {FABRIC}", f"link set n{index} up"], inside=first)
    link = host_link(folder)
    _ip_batch([f"link add {link} type veth peer name host netns {first}"])
    _ip_batch([f"link set host master {FABRIC}", "link set host up"], inside=first)
    batch = [
        f"addr add {plan.host}/{plan.fabric.prefixlen} dev {link}",
        f"link set {link} up",
        f"route add {plan.services} via {plan.node(0)}",
    ]
    batch += [f"route add {plan.pod_subnet(i)} via {plan.node(i)}" for i in range(len(holders))]
    _ip_batch(batch)


def disconnect(folder: Path) -> None:
    """Remove the cluster's veth from the host, and with it the host's routes."""
    link = host_link(folder)
    if not Path("/sys/class/net", link).exists():
        return
    try:
        _ip("link", "delete", link)
    except LocalError:
        # The end of the first node's namespace removes it too, perhaps at this very moment.
        if Path("/sys/class/net", link).exists():
            raise


def _mac(kind: int, index: int) -> str:
    return f"02:74:64:{kind:02x}:00:{index:02x}"


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _ip_batch(lines: Sequence[str], *, inside: int | None = None) -> None:
    prefix = ["nsenter", f"--target={inside}", "--net", "--"] if inside is not None else []
    _run([*prefix, "ip", "-batch", "-"], "\n".join(lines) + "\n")


def _run(argv: Sequence[str], text: str | None = None) -> str:
    done = subprocess.run(
        argv, input=text, capture_output=True, text=True, check=False, timeout=60, env=os.environ
    )
    if done.returncode != 0:
        given = f"\nIts input was:\n{text}" if text else ""
        raise LocalError(f"`{' '.join(argv)}` failed: {done.stderr.strip()}{given}")
    return done.stdout
