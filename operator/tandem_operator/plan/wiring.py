"""Chooses the RDMA wiring of a service from its spec and from what the nodes offer."""

from collections.abc import Iterator
from dataclasses import replace

from tandem_operator.api.pool import GPU_RESOURCE
from tandem_operator.api.rdma import (
    EFA_RESOURCE,
    ClaimRails,
    Rdma,
    RdmaClaim,
    RdmaMode,
    RdmaNetwork,
    RdmaResource,
)
from tandem_operator.facts.observed import Claimable, NodeView
from tandem_operator.manifests.wiring import GKE_RESOURCE_PREFIX, Wiring
from tandem_operator.names.worker import LIBFABRIC_TRANSPORTS, RDMA_TRANSPORTS
from tandem_operator.plan.rails import choose_rails

KNOWN_RESOURCES = (
    "rdma/ib",
    "rdma/hca",
    "rdma/hca_shared_devices_a",
    "rdma/roce_gdr",
)
_TCP = "or set rdma.mode: None to move KV over TCP"


def choose_wiring(
    rdma: Rdma,
    nodes: tuple[NodeView, ...] | None,
    num_gpus: int,
    recorded: RdmaMode | None = None,
    rdma_transports: tuple[str, ...] = RDMA_TRANSPORTS,
    claimable: Claimable | None = None,
    seed: int = 0,
    libfabric_transports: tuple[str, ...] = LIBFABRIC_TRANSPORTS,
) -> Wiring:
    """The wiring for new pods.

    `nodes` and `claimable` are None when the operator may not read them. `num_gpus` is the larger
    of both pools' GPUs per pod. `recorded` is the choice in status: with Auto it stands while the
    nodes still offer it, so that a node that joins later doesn't split a fleet into two wirings.
    `rdma_transports` are those that workers could use the devices for, `libfabric_transports` those
    for EFA: Auto takes none in vain.
    `seed` is a number of the service, by which services spread over rails.
    """
    if rdma.mode is RdmaMode.AUTO and not rdma_transports:
        return Wiring(
            RdmaMode.NONE,
            note="rdma.mode Auto takes no RDMA devices, because no transport of this release uses"
            " them: KV moves over the plain network",
        )
    if rdma.mode is RdmaMode.AUTO:
        if not libfabric_transports:
            nodes = _without_efa(nodes)
        return _automatic(rdma, nodes, num_gpus, recorded, claimable, seed)
    wiring = _complete(_wanted(rdma, rdma.mode, nodes), nodes, num_gpus, claimable, seed)
    if wiring.mode is RdmaMode.EFA and not libfabric_transports:
        note = "no transport of this release speaks libfabric, which EFA needs: KV moves over TCP"
        return replace(wiring, note=note)
    return wiring


def _wanted(rdma: Rdma, mode: RdmaMode, nodes: tuple[NodeView, ...] | None) -> Wiring:
    """What a mode means for this spec."""
    if mode is RdmaMode.EFA:
        # Without a number of their own, pods get each GPU's share of the node's devices.
        named = rdma.resource or RdmaResource(name=EFA_RESOURCE, count="PerGPU")
        return Wiring(mode, named.name, named.count, share=1 if rdma.resource else _share(nodes))
    if mode is RdmaMode.DEVICE_PLUGIN:
        named = rdma.resource or RdmaResource()
        return Wiring(mode, named.name, named.count)
    if mode is RdmaMode.MULTUS:
        if rdma.resource is None:
            return Wiring(mode, networks=rdma.networks)
        return Wiring(mode, rdma.resource.name, rdma.resource.count, networks=rdma.networks)
    if mode is RdmaMode.GKE:
        return Wiring(mode, networks=rdma.networks)
    if mode is RdmaMode.DRA:
        return Wiring(mode, claim=rdma.claim or RdmaClaim())
    return Wiring(mode)


def _complete(
    wiring: Wiring,
    nodes: tuple[NodeView, ...] | None,
    num_gpus: int,
    claimable: Claimable | None,
    seed: int,
) -> Wiring:
    """The wiring with its rails, and with what is missing for it."""
    if wiring.claim is None:
        return replace(wiring, problem=_missing(wiring, nodes, num_gpus))
    problem = "" if claimable is None else _unclaimable(wiring, claimable, num_gpus)
    if wiring.claim.rails is ClaimRails.ANY:
        return replace(wiring, problem=problem)
    if claimable is None:
        problem = (
            "rdma.claim.rails is SameAcrossRoles, but the operator can't read ResourceSlices in a"
            " namespaced installation: set rdma.claim.rails: Any"
        )
        return replace(wiring, problem=problem, blocked=True)
    wanted = max(1, num_gpus)
    rails = choose_rails(claimable.devices, wiring.claim.rail_attribute, wanted, seed)
    if len(rails) == wanted:
        return replace(wiring, rails=rails, problem=problem)
    problem = problem or (
        f"each worker claims NICs of {wanted} rails, but the ResourceSlices name {len(rails)} by"
        f" {wiring.claim.rail_attribute}: set rdma.claim.railAttribute to the attribute that names"
        " a NIC's rail, or set rdma.claim.rails: Any"
    )
    return replace(wiring, problem=problem, blocked=True)


def _automatic(
    rdma: Rdma,
    nodes: tuple[NodeView, ...] | None,
    num_gpus: int,
    recorded: RdmaMode | None,
    claimable: Claimable | None,
    seed: int,
) -> Wiring:
    if nodes is None:
        return Wiring(
            RdmaMode.NONE,
            note="rdma.mode Auto can't read nodes in a namespaced installation, so KV moves over"
            " the plain network: set rdma.mode to what the nodes offer",
        )
    if recorded is RdmaMode.NONE:
        return Wiring(RdmaMode.NONE)
    offered = list(_candidates(rdma, nodes, num_gpus, claimable))
    for wanted in sorted(offered, key=lambda wiring: wiring.mode is not recorded):
        wiring = _complete(wanted, nodes, num_gpus, claimable, seed)
        if not wiring.problem:
            return wiring
    looked_for = rdma.resource.name if rdma.resource else "RDMA devices"
    return Wiring(
        RdmaMode.NONE,
        note=f"no node offers {looked_for}, so KV moves over the plain network: when nodes do,"
        " set rdma.mode to how they offer them",
    )


def _candidates(
    rdma: Rdma, nodes: tuple[NodeView, ...], num_gpus: int, claimable: Claimable | None
) -> Iterator[Wiring]:
    """What the nodes may offer, the more particular first.

    `resource`, `networks` or `claim` in the spec say what to look for.
    """
    offered = {name for node in nodes if node.schedulable for name in node.resources}
    named = rdma.resource
    if rdma.networks:
        gke = {f"{GKE_RESOURCE_PREFIX}{network.name}" for network in rdma.networks} <= offered
        yield _wanted(rdma, RdmaMode.GKE if gke else RdmaMode.MULTUS, nodes)
        return
    if named is not None:
        mode = RdmaMode.EFA if named.name == EFA_RESOURCE else RdmaMode.DEVICE_PLUGIN
        yield _wanted(rdma, mode, nodes)
        return
    if rdma.claim is not None or _has_rdma_devices(claimable):
        yield _wanted(rdma, RdmaMode.DRA, nodes)
    if rdma.claim is not None:
        return
    if EFA_RESOURCE in offered:
        yield _wanted(rdma, RdmaMode.EFA, nodes)
    if networks := _gke_networks(nodes)[: max(1, num_gpus)]:
        yield Wiring(RdmaMode.GKE, networks=networks)
    plugins = {name for name in offered if name.startswith("rdma/")}
    known = [name for name in KNOWN_RESOURCES if name in plugins]
    for name in known + sorted(plugins - set(known)):
        yield Wiring(RdmaMode.DEVICE_PLUGIN, name)


def _has_rdma_devices(claimable: Claimable | None) -> bool:
    devices = claimable.devices if claimable is not None else ()
    return any(
        name.endswith("/rdma") and value is True
        for device in devices
        for name, value in device.attributes.items()
    )


def _gke_networks(nodes: tuple[NodeView, ...]) -> tuple[RdmaNetwork, ...]:
    """GKE's RDMA networks that a node is on, by its annotation and its resources."""
    names = {
        network
        for node in nodes
        if node.schedulable
        for network in node.networks
        if "rdma" in network and node.resources.get(f"{GKE_RESOURCE_PREFIX}{network}")
    }
    return tuple(RdmaNetwork(name=name) for name in sorted(names, key=lambda n: (len(n), n)))


def _without_efa(nodes: tuple[NodeView, ...] | None) -> tuple[NodeView, ...] | None:
    if nodes is None:
        return None
    return tuple(
        replace(
            node,
            resources={key: num for key, num in node.resources.items() if key != EFA_RESOURCE},
        )
        for node in nodes
    )


def _share(nodes: tuple[NodeView, ...] | None) -> int:
    """EFA devices for each GPU of a node, the fewest of all nodes that have both."""
    shares = [
        node.resources[EFA_RESOURCE] // gpus
        for node in nodes or ()
        if node.resources.get(EFA_RESOURCE) and (gpus := node.resources.get(GPU_RESOURCE, 0))
    ]
    return max(1, min(shares, default=1))


def _missing(wiring: Wiring, nodes: tuple[NodeView, ...] | None, num_gpus: int) -> str:
    """Why no node can take a pod with this wiring; empty if one can, or nobody may look."""
    if nodes is None:
        return ""
    wanted = {wiring.resource: wiring.pieces(num_gpus)} if wiring.resource else {}
    if wiring.mode is RdmaMode.GKE:
        wanted = {f"{GKE_RESOURCE_PREFIX}{network.name}": 1 for network in wiring.networks}
    for name, pieces in wanted.items():
        most = max((node.resources.get(name, 0) for node in nodes if node.schedulable), default=0)
        if most >= pieces:
            continue
        if most:
            return (
                f"each pod requests {pieces} of {name}, but no schedulable node offers more than"
                f" {most}: lower rdma.resource.count"
            )
        return f"no schedulable node offers {name}, which rdma.mode {wiring.mode} needs: " + (
            f"attach the nodes to the network, correct rdma.networks, {_TCP}"
            if wiring.mode is RdmaMode.GKE
            else "install the RDMA device plugin on the nodes, set rdma.resource.name to the"
            f" resource that they offer, {_TCP}"
        )
    return ""


def _unclaimable(wiring: Wiring, claimable: Claimable, num_gpus: int) -> str:
    """Why the claim can't be allocated; empty if nothing is known to be in its way."""
    claim = wiring.claim
    assert claim is not None, "only a wiring with a claim is asked about"
    classes = {"deviceClass": claim.device_class}
    if wiring.claims_gpus(num_gpus):
        classes["gpuDeviceClass"] = claim.gpu_device_class
    for field, name in classes.items():
        if name not in claimable.classes:
            return (
                f"there is no DeviceClass {name}: install the DRA driver that brings it, set"
                f" rdma.claim.{field} to one that exists, {_TCP}"
            )
    if not claimable.devices:
        return f"no ResourceSlice has a device: install a DRA driver on the nodes, {_TCP}"
    return ""
