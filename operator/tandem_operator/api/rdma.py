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


_MODES = (RdmaMode.AUTO, RdmaMode.NONE, RdmaMode.DEVICE_PLUGIN, RdmaMode.HOST_PATH)


_NO_DEVICES = "['None']" if RDMA_TRANSPORTS else "['None', 'Auto']"
"""The modes that take no devices, in CEL."""


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
    """Name of the network."""
    namespace: DnsName | None = None
    """Namespace of the NetworkAttachmentDefinition; default: the service's."""


class RdmaClaim(ApiObject):
    """The dynamic resource claim for NICs."""

    device_class: DnsName = "dranet"
    """DeviceClass of the NICs."""
    align_with: ClaimAlignment = ClaimAlignment.PCIE_ROOT
    """What the NIC must share with the pod's GPU."""
    rails: ClaimRails = ClaimRails.SAME_ACROSS_ROLES
    """Whether prefill and decode claims must get rails that reach each other."""


class RdmaDevices(ApiObject):
    """Which NICs are used inside the pod."""

    map: Annotated[
        DeviceMap, refused_unless(DeviceMap.PER_GPU, because="no transport maps NICs to GPUs")
    ] = DeviceMap.PER_GPU
    """PerGPU: the nearest NIC for each GPU, found in sysfs; All: every NIC for every GPU."""
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
    roles: Annotated[
        RolePlacement,
        refused_unless(RolePlacement.ANY, because="workers are placed by the scheduler alone"),
    ] = RolePlacement.ANY
    """Whether prefill and decode workers must (Pack), must not (Spread) or may (Any) share
    nodes."""


class Rdma(ApiObject):
    """How workers get access to RDMA devices."""

    mode: Annotated[
        RdmaMode, refused_unless(*_MODES, because="the operator can't wire pods in other ways")
    ] = RdmaMode.AUTO
    """How devices get into the pods. Auto takes what the nodes offer, if workers have a transport
    that uses it, and shows its choice in status; HostPath it never takes."""
    resource: RdmaResource | None = None
    """Extended resource for DevicePlugin, Multus and Efa; default: rdma/ib per pod."""
    networks: Annotated[
        tuple[RdmaNetwork, ...],
        Field(max_length=16, json_schema_extra=ATOMIC),
        refused_unless((), because="the operator attaches no networks"),
    ] = ()
    """Networks to attach, in order, for Multus and Gke."""
    claim: Annotated[
        RdmaClaim | None, refused_unless(because="the operator makes no resource claims")
    ] = None
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
            f"!(self.mode in {_NO_DEVICES}) || (size(self.devices.include) == 0 &&"
            " size(self.devices.exclude) == 0 && self.devices.gidIndex == 'Auto')",
            "rdma.devices has no effect with this rdma.mode, which takes no devices: remove devices"
            " or set mode: DevicePlugin",
            ".devices",
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
            "size(self.networks) == 0 || self.mode in ['Auto', 'Multus', 'Gke']",
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
            "!has(self.claim) || self.mode in ['Auto', 'Dra']",
            "rdma.claim has no effect with this rdma.mode: set mode: Dra or remove claim",
            ".claim",
        ),
    )
