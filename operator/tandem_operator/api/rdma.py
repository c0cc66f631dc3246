"""How workers get access to RDMA devices."""

from enum import StrEnum
from typing import Annotated, ClassVar, Final

from pydantic import Field

from tandem_operator.api.api_object import ATOMIC, SET, ApiObject, Rule
from tandem_operator.api.quantity import Quantity
from tandem_operator.api.refusal import refused_unless
from tandem_operator.names.worker import RDMA_TRANSPORTS

DnsName = Annotated[
    str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
]
DeviceName = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9_.:-]+$")]


class RdmaMode(StrEnum):
    """Ways to get RDMA devices into a pod."""

    AUTO = "Auto"
    NONE = "None"
    DEVICE_PLUGIN = "DevicePlugin"
    MULTUS = "Multus"
    EFA = "Efa"
    GKE = "Gke"
    DRA = "Dra"
    HOST_PATH = "HostPath"


_NO_DEVICES = "['None']" if RDMA_TRANSPORTS else "['None', 'Auto']"
"""The modes that take no devices, in CEL."""
_OR_AUTO = "'Auto', " if RDMA_TRANSPORTS else ""


def modes(*names: str) -> str:
    """These modes as a list in CEL, with Auto if it may choose one of them."""
    return f"[{_OR_AUTO}{', '.join(repr(name) for name in names)}]"


EFA_RESOURCE: Final = "vpc.amazonaws.com/efa"
"""The resource by which AWS's device plugin offers EFA devices."""


SHARED_MEMORY: Final = "32Gi"


class ClaimAlignment(StrEnum):
    """What the claimed NIC shares with the GPU."""

    NONE = "None"
    PCIE_ROOT = "PcieRoot"
    NUMA_NODE = "NumaNode"


class ClaimRails(StrEnum):
    """Which rails the claims of the two roles may get."""

    ANY = "Any"
    SAME_ACROSS_ROLES = "SameAcrossRoles"


class DeviceMap(StrEnum):
    """How NICs are given to GPUs inside a pod."""

    PER_GPU = "PerGPU"
    ALL = "All"


class RolePlacement(StrEnum):
    """Whether prefill and decode workers share nodes."""

    ANY = "Any"
    SPREAD = "Spread"
    PACK = "Pack"


class RdmaResource(ApiObject):
    """The extended resource by which a device plugin offers NICs."""

    name: Annotated[
        str,
        Field(
            min_length=3,
            max_length=253,
            pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
        ),
    ] = "rdma/ib"
    """Name of the extended resource, like rdma/ib, rdma/hca_shared_devices_a or
    vpc.amazonaws.com/efa."""
    count: Annotated[str, Field(max_length=6, pattern=r"^(PerPod|PerGPU|[1-9][0-9]{0,2})$")] = (
        "PerPod"
    )
    """How many each pod requests: PerPod (one), PerGPU (one per GPU) or a number as text."""


class RdmaNetwork(ApiObject):
    """A network attachment of Multus, or an interface network of GKE."""

    name: DnsName
    """Name of the NetworkAttachmentDefinition, or of the Network of GKE."""
    namespace: DnsName | None = None
    """Namespace of the NetworkAttachmentDefinition; default: the service's. Networks of GKE have
    none."""


class RdmaClaim(ApiObject):
    """The dynamic resource claim for NICs."""

    device_class: DnsName = "dranet"
    """DeviceClass of the NICs. Each pod claims one per GPU, or one if it has no GPU."""
    gpu_device_class: DnsName = "gpu.nvidia.com"
    """DeviceClass of the GPUs, which alignWith claims together with the NICs instead of requesting
    nvidia.com/gpu."""
    align_with: Annotated[
        ClaimAlignment,
        refused_unless(
            ClaimAlignment.NONE,
            ClaimAlignment.PCIE_ROOT,
            because="drivers of GPUs and NICs have no attribute for NUMA nodes in common",
        ),
    ] = ClaimAlignment.PCIE_ROOT
    """What each NIC must share with its GPU. Without GPUs it doesn't matter."""
    rails: ClaimRails = ClaimRails.ANY
    """SameAcrossRoles: all workers get NICs of the same rails, for a fabric whose rails don't reach
    each other; a node then has room for one worker per NIC of a rail. Any: the nearest NICs."""
    rail_attribute: Annotated[
        str,
        Field(
            max_length=317,
            pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z_][A-Za-z0-9_]*$",
        ),
    ] = "dra.net/ifName"
    """Attribute in ResourceSlices whose value names a NIC's rail, for SameAcrossRoles."""


class RdmaDevices(ApiObject):
    """Which NICs are used inside the pod."""

    map: DeviceMap = DeviceMap.PER_GPU
    """PerGPU: the nearest NICs for each GPU, found in sysfs; All: every NIC for every GPU."""
    include: Annotated[tuple[DeviceName, ...], Field(max_length=64, json_schema_extra=SET)] = ()
    """Use only these devices, like mlx5_0; empty: all active ones."""
    exclude: Annotated[tuple[DeviceName, ...], Field(max_length=64, json_schema_extra=SET)] = ()
    """Never use these devices, like mlx5_bond_0."""
    gid_index: Annotated[str, Field(max_length=4, pattern=r"^(Auto|[0-9]{1,3})$")] = "Auto"
    """GID index for RoCE: Auto takes the RoCE v2 entry, or a number as text."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!self.include.exists(d, d in self.exclude)",
            "rdma.devices.include and rdma.devices.exclude name the same device: remove it from"
            " one of them",
            ".exclude",
        ),
    )


class RdmaPlacement(ApiObject):
    """Where workers are placed relative to the fabric."""

    same_fabric_key: Annotated[str, Field(max_length=317)] = ""
    """Node label whose value all workers must share, like ib.coreweave.cloud/fabric; empty:
    none."""
    roles: RolePlacement = RolePlacement.ANY
    """Spread: prefill and decode workers never share a node, which mode Efa always needs; Pack: all
    workers share one node; Any: the scheduler decides."""


class Rdma(ApiObject):
    """How workers get access to RDMA devices."""

    mode: RdmaMode = RdmaMode.AUTO
    """How devices get into the pods. Auto takes what the nodes offer, if workers have a transport
    that uses it, and shows its choice in status; HostPath it never takes."""
    resource: RdmaResource | None = None
    """Extended resource; default: rdma/ib per pod for DevicePlugin, each GPU's share of
    vpc.amazonaws.com/efa for Efa, and none for Multus, where a webhook often adds it."""
    networks: Annotated[
        tuple[RdmaNetwork, ...],
        Field(max_length=16, json_schema_extra=ATOMIC),
    ] = ()
    """Networks to attach, in order, for Multus and Gke."""
    claim: RdmaClaim | None = None
    """Claim for Dra."""
    devices: RdmaDevices = RdmaDevices()
    """Which NICs are used inside the pod."""
    shared_memory: Quantity = SHARED_MEMORY
    """Upper bound of /dev/shm in the workers; memory counts only when used. With kvTransfer.backend
    Shm it can't be set: the workers of a node then share the node's /dev/shm."""
    placement: RdmaPlacement = RdmaPlacement()
    """Where workers are placed relative to the fabric."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.mode != 'HostPath' || !has(self.resource)",
            "rdma.resource requests devices from a device plugin, which can't be combined with"
            " rdma.mode HostPath (libraries would see devices that the cgroup blocks): remove"
            " resource or set mode: DevicePlugin",
            ".resource",
        ),
        Rule(
            f"!(self.mode in {_NO_DEVICES}) || !has(self.resource)",
            "rdma.resource has no effect with this rdma.mode, which takes no devices: remove"
            " resource or set mode: DevicePlugin",
            ".resource",
        ),
        Rule(
            "!(self.mode in ['Gke', 'Dra']) || !has(self.resource)",
            "rdma.resource has no effect with rdma.mode Gke, which requests the networks, and Dra,"
            " which makes a claim: remove resource",
            ".resource",
        ),
        Rule(
            f"self.mode != 'Efa' || !has(self.resource) || self.resource.name == '{EFA_RESOURCE}'",
            "rdma.resource.name is not the resource of EFA devices: set it to"
            f" {EFA_RESOURCE}, or set mode: DevicePlugin",
            ".resource.name",
        ),
        Rule(
            f"!(self.mode in {_NO_DEVICES}) || (size(self.devices.include) == 0 &&"
            " size(self.devices.exclude) == 0 && self.devices.gidIndex == 'Auto' &&"
            " self.devices.map == 'PerGPU')",
            "rdma.devices has no effect with this rdma.mode, which takes no devices: remove devices"
            " or set mode: DevicePlugin",
            ".devices",
        ),
        Rule(
            "self.mode != 'Efa' || self.devices.gidIndex == 'Auto'",
            "rdma.devices.gidIndex has no effect with rdma.mode Efa, whose devices have one GID:"
            " remove gidIndex",
            ".devices.gidIndex",
        ),
        Rule(
            "self.mode != 'Efa' || self.placement.roles != 'Pack'",
            "rdma.placement.roles Pack doesn't work with rdma.mode Efa, which can't connect pods of"
            " the same node: set placement.roles: Spread",
            ".placement.roles",
        ),
        Rule(
            "!(self.mode in ['Multus', 'Gke']) || size(self.networks) > 0",
            "rdma.networks is empty, and rdma.mode Multus and Gke need the networks to attach: add"
            " networks: [{name: rail0}]",
            ".networks",
        ),
        Rule(
            f"size(self.networks) == 0 || self.mode in {modes('Multus', 'Gke')}",
            "rdma.networks has no effect with this rdma.mode: set mode: Multus or Gke, or remove"
            " networks",
            ".networks",
        ),
        Rule(
            "self.mode != 'Dra' || has(self.claim)",
            "rdma.claim is missing, and rdma.mode Dra needs the device class: add claim:"
            " {deviceClass: dranet}",
            ".claim",
        ),
        Rule(
            f"!has(self.claim) || self.mode in {modes('Dra')}",
            "rdma.claim has no effect with this rdma.mode: set mode: Dra or remove claim",
            ".claim",
        ),
        Rule(
            "self.mode != 'Gke' || self.networks.all(n, !has(n.__namespace__))",
            "rdma.networks[].namespace has no effect with rdma.mode Gke, whose Networks belong to"
            " the cluster: remove namespace",
            ".networks",
        ),
    )
