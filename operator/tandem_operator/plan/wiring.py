"""Chooses the RDMA wiring of a service from its spec and from what the nodes offer."""

from tandem_operator.api.rdma import Rdma, RdmaMode, RdmaResource
from tandem_operator.facts.observed import NodeView
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.names.worker import RDMA_TRANSPORTS

KNOWN_RESOURCES = (
    "rdma/ib",
    "rdma/hca",
    "rdma/hca_shared_devices_a",
    "rdma/roce_gdr",
)
SUPPORTED = (RdmaMode.AUTO, RdmaMode.NONE, RdmaMode.DEVICE_PLUGIN, RdmaMode.HOST_PATH)


def choose_wiring(
    rdma: Rdma,
    nodes: tuple[NodeView, ...] | None,
    num_gpus: int,
    recorded: RdmaMode | None = None,
    rdma_transports: tuple[str, ...] = RDMA_TRANSPORTS,
) -> Wiring:
    """The wiring for new pods.

    `nodes` is None when the operator may not read nodes. `num_gpus` is the larger of both pools'
    GPUs per pod. `recorded` is the choice in status: with Auto it stands while the nodes still
    offer it, so that a node that joins later doesn't split a fleet into two wirings.
    `rdma_transports` are those that workers could use the devices for: Auto takes none in vain.
    """
    if rdma.mode is RdmaMode.AUTO and not rdma_transports:
        return Wiring(
            RdmaMode.NONE,
            note="rdma.mode Auto takes no RDMA devices, because no transport of this release uses"
            " them: KV moves over the plain network",
        )
    if rdma.mode is RdmaMode.AUTO:
        return _automatic(rdma, nodes, num_gpus, recorded)
    if rdma.mode is RdmaMode.DEVICE_PLUGIN:
        wanted = rdma.resource or RdmaResource()
        wiring = Wiring(rdma.mode, wanted.name, wanted.count)
        return Wiring(rdma.mode, wanted.name, wanted.count, _missing(wiring, nodes, num_gpus))
    if rdma.mode not in SUPPORTED:
        return Wiring(
            rdma.mode,
            problem=f"rdma.mode {rdma.mode} is not supported by this release: set it to"
            " DevicePlugin, HostPath, None or Auto",
            supported=False,
        )
    return Wiring(rdma.mode)


def _automatic(
    rdma: Rdma, nodes: tuple[NodeView, ...] | None, num_gpus: int, recorded: RdmaMode | None
) -> Wiring:
    if nodes is None:
        return Wiring(
            RdmaMode.NONE,
            note="rdma.mode Auto can't read nodes in a namespaced installation, so KV moves over"
            " the plain network: set rdma.mode to what the nodes offer",
        )
    if recorded is RdmaMode.NONE:
        return Wiring(RdmaMode.NONE)
    for name, count in _candidates(rdma, nodes):
        wiring = Wiring(RdmaMode.DEVICE_PLUGIN, name, count)
        if not _missing(wiring, nodes, num_gpus):
            return wiring
    looked_for = rdma.resource.name if rdma.resource else "an RDMA device plugin's resource"
    return Wiring(
        RdmaMode.NONE,
        note=f"no node offers {looked_for}, so KV moves over the plain network: when nodes offer"
        " it, set rdma.mode: DevicePlugin",
    )


def _candidates(rdma: Rdma, nodes: tuple[NodeView, ...]) -> list[tuple[str, str]]:
    if rdma.resource is not None:
        return [(rdma.resource.name, rdma.resource.count)]
    offered = {name for node in nodes for name in node.resources if name.startswith("rdma/")}
    known = [name for name in KNOWN_RESOURCES if name in offered]
    return [(name, "PerPod") for name in known + sorted(offered - set(known))]


def _missing(wiring: Wiring, nodes: tuple[NodeView, ...] | None, num_gpus: int) -> str:
    if nodes is None:
        return ""
    wanted = wiring.pieces(num_gpus)
    most = max((n.resources.get(wiring.resource, 0) for n in nodes if n.schedulable), default=0)
    if most >= wanted:
        return ""
    if most == 0:
        return (
            f"no schedulable node offers {wiring.resource}, which rdma.mode DevicePlugin needs:"
            " install the RDMA device plugin on the nodes, set rdma.resource.name to the resource"
            " that they offer, or set rdma.mode: None to move KV over TCP"
        )
    return (
        f"each pod requests {wanted} of {wiring.resource}, but no schedulable node offers more than"
        f" {most}: lower rdma.resource.count"
    )
