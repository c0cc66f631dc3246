"""Nodes as namespaces, and the network between them.

A node is a pair of namespaces (network and mount) held by one idle process, the *holder*. Nothing
has a name on the host but one veth per cluster, so when the processes are gone everything is:
no named namespace, no mount, no firewall rule stays behind.

The first node carries a bridge, the *fabric*, to which the other nodes and the host are joined by
veths. Every node has a second bridge for its pods, and a route to the pods of every other node.
The host has routes to pods and Services, so it reaches both as a pod would.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Network
from pathlib import Path

from tandem_local.addresses import AddressPlan
from tandem_local.errors import LocalError, StartError
from tandem_local.process import ProcessRef

POD_BRIDGE = "pods"
FABRIC = "fabric"

# The kubelet uses these paths whatever --root-dir says. Each node sees an empty folder of its own
# there, so that two kubelets on one machine do not take them from each other.
PRIVATE_FOLDERS = ("/var/lib/kubelet", "/var/log/containers")
# The kubelet sets these for the whole machine. It finds them as it wants them, in files of ours
# that lie over the real ones inside the node, and leaves the machine as it is.
KUBELET_TUNABLES = {
    "/proc/sys/vm/overcommit_memory": "1",
    "/proc/sys/vm/panic_on_oom": "0",
    "/proc/sys/kernel/panic": "10",
    "/proc/sys/kernel/panic_on_oops": "1",
    "/proc/sys/kernel/keys/root_maxkeys": "1000000",
    "/proc/sys/kernel/keys/root_maxbytes": "25000000",
}
NODE_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
}


def host_link(name: str) -> str:
    """Name of the cluster's veth on the host (at most 15 characters)."""
    return "tdm" + hashlib.sha256(name.encode()).hexdigest()[:10]


def host_networks() -> list[IPv4Network]:
    """Every IPv4 range that the host routes or has an address in, default routes left out."""
    routes = json.loads(_ip("-j", "-4", "route", "show", "table", "all") or "[]")
    networks = []
    for route in routes:
        if route["dst"] != "default":
            networks.append(ipaddress.IPv4Network(route["dst"], strict=False))
    return networks


def enter(holder: int) -> list[str]:
    """Prefix of a command that runs inside the node; it execs, so the pid is the command's."""
    # Not `ip netns exec`: that one mounts a fresh /sys, which hides /sys/fs/cgroup.
    return ["nsenter", f"--target={holder}", "--net", "--mount", "--"]


def holder_script(folder: Path) -> str:
    """What the holder runs before it idles: masks what the kubelet would write on the machine."""
    lines = []
    for private in PRIVATE_FOLDERS:
        lines.append(_mask(Path(private)))
    tunables = folder / "tunables"
    for path, value in KUBELET_TUNABLES.items():
        stand_in = tunables / path.removeprefix("/proc/sys/").replace("/", ".")
        lines.append(
            f"if test -e {path}; then echo {value} > {shlex.quote(str(stand_in))}; "
            f"mount --bind {shlex.quote(str(stand_in))} {path}; fi"
        )
    for path, value in NODE_SYSCTLS.items():
        lines.append(f"echo {value} > /proc/sys/{path}")
    lines.append(f"echo ready > {shlex.quote(str(folder / 'holder.ready'))}")
    lines.append("exec sleep infinity")
    return "\n".join(lines)


def start_holder(folder: Path, environment: Mapping[str, str], log: Path) -> ProcessRef:
    """Start the process that holds a node's namespaces; returns when they are furnished."""
    (folder / "tunables").mkdir(parents=True, exist_ok=True)
    ready = folder / "holder.ready"
    ready.unlink(missing_ok=True)
    # `slave`: what the host unmounts later is not pinned here, and nothing of ours goes back.
    argv = ["unshare", "--net", "--mount", "--propagation=slave", "sh", "-euc"]
    with log.open("ab") as output:
        child = subprocess.Popen(
            [*argv, holder_script(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            start_new_session=True,
            cwd="/",
        )
    deadline = time.monotonic() + 30
    while not ready.exists():
        if child.poll() is not None or time.monotonic() > deadline:
            detail = log.read_text(errors="replace").strip()[-2000:]
            raise StartError(f"the namespaces of a node could not be made:\n{detail}")
        time.sleep(0.01)
    ref = ProcessRef.of(child.pid)
    if ref is None:
        raise StartError(f"the holder of a node's namespaces died at once; see {log}")
    return ref


def connect(name: str, plan: AddressPlan, holders: Sequence[int]) -> None:
    """Join the nodes to each other and to the host. The host's firewall is not touched."""
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
            # A bridge without a fixed address takes its lowest port's: pods would lose it.
            f"link add {POD_BRIDGE} address {_mac(1, index)} type bridge",
            f"addr add {plan.pod_gateway(index)}/{subnet.prefixlen} dev {POD_BRIDGE}",
            f"link set {POD_BRIDGE} up",
            # kube-proxy rewrites what goes to a Service, but only once the kernel has a route.
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
    link = host_link(name)
    _ip_batch([f"link add {link} type veth peer name host netns {first}"])
    _ip_batch([f"link set host master {FABRIC}", "link set host up"], inside=first)
    batch = [
        f"addr add {plan.host}/{plan.fabric.prefixlen} dev {link}",
        f"link set {link} up",
        f"route add {plan.services} via {plan.node(0)}",
    ]
    batch += [f"route add {plan.pod_subnet(i)} via {plan.node(i)}" for i in range(len(holders))]
    _ip_batch(batch)


def disconnect(name: str) -> None:
    """Remove the cluster's veth from the host, and with it the host's routes."""
    link = host_link(name)
    if not Path("/sys/class/net", link).exists():
        return
    try:
        _ip("link", "delete", link)
    except LocalError:
        # The end of the first node's namespace removes it too, at the same moment perhaps.
        if Path("/sys/class/net", link).exists():
            raise


def _mask(path: Path) -> str:
    """Shell lines that give the mount namespace an empty `path`, made without touching the host."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    target = shlex.quote(str(path))
    if missing.exists():
        return f"mount -t tmpfs -o mode=0755 tandem {target}"
    # The mount point must not be made on the host: lay a tmpfs over the parent and bind the
    # parent's own entries back into it.
    parent = shlex.quote(str(missing.parent))
    return "\n".join(
        [
            "stage=$(mktemp -d)",
            f"mount --rbind {parent} $stage",
            f"mount -t tmpfs -o mode=0755 tandem {parent}",
            "for entry in $stage/* $stage/.[!.]*; do",
            f"  name={parent}/${{entry##*/}}",
            '  if test -L "$entry"; then cp -P "$entry" "$name"',
            '  elif test -d "$entry"; then mkdir "$name"; mount --rbind "$entry" "$name"',
            '  elif test -e "$entry"; then : > "$name"; mount --bind "$entry" "$name"; fi',
            "done",
            "umount -l $stage",
            "rmdir $stage",
            f"mkdir -p {target}",
        ]
    )


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
        raise LocalError(f"`{' '.join(argv)}` failed: {done.stderr.strip()}\n{text or ''}")
    return done.stdout
