"""Nodes modelled on real ones: where their GPUs and NICs sit, and what their links are."""

from dataclasses import dataclass

from tandem_engine.fabric.tests.sysfs_tree import FakeGpu, FakeNic

V1, V2 = "IB/RoCE v1", "RoCE v2"
LINK_LOCAL = "fe80:0000:0000:0000:0e42:a1ff:fe12:3450"


@dataclass(frozen=True)
class Machine:
    """One node."""

    gpus: tuple[FakeGpu, ...] = ()
    nics: tuple[FakeNic, ...] = ()


def ipv4_gid(host: int) -> str:
    """The RoCE GID of 10.0.7.HOST."""
    return f"0000:0000:0000:0000:0000:ffff:0a00:07{host:02x}"


def roce(host: int, index: int = 3) -> dict[int, tuple[str, str]]:
    """A usual GID table of RoCE, whose IPv4 entry of version 2 is at `index`."""
    return {
        0: (LINK_LOCAL, V1),
        1: (LINK_LOCAL, V2),
        index - 1: (ipv4_gid(host), V1),
        index: (ipv4_gid(host), V2),
    }


def _switched(bus: int, slot: int, domain: str = "0000") -> str:
    """A function behind one switch: root port, upstream port, downstream port, function."""
    above = f"pci{domain}:{bus:02x} {domain}:{bus:02x}:01.0 {domain}:{bus + 1:02x}:00.0"
    return f"{above} {domain}:{bus + 2:02x}:{slot:02x}.0 {domain}:{bus + 3 + slot:02x}:00.0"


def bare_infiniband() -> Machine:
    """An HGX board: each GPU shares a switch with one ConnectX-7; GPU 0's is mlx5_4.

    Besides, a bonded pair for storage, and a NIC that no subnet manager has given a LID.
    """
    buses = [0x16, 0x36, 0x56, 0x76, 0x96, 0xB6, 0xD6, 0xE6]
    names = ["mlx5_4", "mlx5_5", "mlx5_6", "mlx5_7", "mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"]
    gpus = [FakeGpu(_switched(bus, 0), n // 4, n) for n, bus in enumerate(buses)]
    nics = [
        FakeNic(name, _switched(bus, 1), n // 4, lid=n + 1)
        for n, (bus, name) in enumerate(zip(buses, names, strict=True))
    ]
    bond = FakeNic(
        "mlx5_bond_0",
        "pci0000:00 0000:00:1c.0 0000:02:00.0",
        0,
        "Ethernet",
        rate="100 Gb/sec (4X EDR)",
        lid=0,
        gids=roce(9),
    )
    unmanaged = FakeNic("mlx5_8", "pci0000:e0 0000:e0:01.0 0000:e1:00.0", 1, lid=0)
    return Machine(tuple(gpus), (*nics, bond, unmanaged))


def coreweave() -> Machine:
    """As a bare HGX board, in a pod that has four of the GPUs and sees all NICs (rdma/ib)."""
    whole = bare_infiniband()
    gpus = tuple(
        FakeGpu(gpu.path, gpu.numa, n if n >= 4 else None) for n, gpu in enumerate(whole.gpus)
    )
    return Machine(gpus, whole.nics)


def aks_nd_h100_v5() -> Machine:
    """A virtual machine: every function has a PCI domain of its own, so only NUMA nodes tell.

    mlx5_an0 is the accelerated Ethernet of the virtual machine.
    """
    vmbus = "LNXSYSTM:00 LNXSYBUS:00 ACPI0004:00 VMBUS:00 guid"
    gpus = [
        FakeGpu(f"{vmbus}-{n} pci000{n}:00 000{n}:00:00.0", (n - 1) // 4, n - 1)
        for n in range(1, 9)
    ]
    nics = [
        FakeNic(
            f"mlx5_ib{n}", f"{vmbus}-1{n} pci010{n + 1}:00 010{n + 1}:00:00.0", n // 4, lid=n + 7
        )
        for n in range(8)
    ]
    ethernet = FakeNic(
        "mlx5_an0",
        f"{vmbus}-9 pcia6d9:00 a6d9:00:02.0",
        0,
        "Ethernet",
        rate="100 Gb/sec (4X EDR)",
        lid=0,
    )
    return Machine(tuple(gpus), (*nics, ethernet))


def eks_p5() -> Machine:
    """A p5.48xlarge: four EFA devices beside each of eight GPUs."""
    buses = [0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xAA, 0xBB]
    gpus = [FakeGpu(_switched(bus, 4), n // 4, n) for n, bus in enumerate(buses)]
    nics = [
        FakeNic(
            f"rdmap{bus + 3 + slot}s0",
            _switched(bus, slot),
            n // 4,
            "Unspecified",
            rate="100 Gb/sec (4X EDR)",
            lid=0,
            driver="efa",
        )
        for n, bus in enumerate(buses)
        for slot in range(4)
    ]
    return Machine(tuple(gpus), tuple(nics))


def gke_a3_ultra() -> Machine:
    """Eight GPUs and eight RoCE functions, two of each behind a switch; a gVNIC has no RDMA."""
    buses = [0x84, 0x8C, 0xC4, 0xCC]
    gpus = [
        FakeGpu(_switched(bus, slot), n // 2, 2 * n + slot)
        for n, bus in enumerate(buses)
        for slot in (0, 1)
    ]
    nics = [
        FakeNic(
            f"mlx5_{2 * n + slot}",
            _switched(bus, slot + 2),
            n // 2,
            "Ethernet",
            lid=0,
            gids=roce(2 * n + slot),
        )
        for n, bus in enumerate(buses)
        for slot in (0, 1)
    ]
    return Machine(tuple(gpus), tuple(nics))


def openshift_sriov() -> Machine:
    """A pod with one GPU and two virtual functions; the GID index differs between them."""
    gpu = FakeGpu("pci0000:36 0000:36:01.0 0000:37:00.0", 0, 2)
    other = FakeGpu("pci0000:b6 0000:b6:01.0 0000:b7:00.0", 1, None)
    near = "pci0000:36 0000:36:02.0"
    nics = (
        FakeNic("mlx5_12", f"{near} 0000:38:00.2", 0, "Ethernet", lid=0, gids=roce(1, 3)),
        FakeNic("mlx5_13", f"{near} 0000:38:00.3", 0, "Ethernet", lid=0, gids=roce(2, 5)),
        # The physical function, which is visible but not the pod's.
        FakeNic("mlx5_2", f"{near} 0000:38:00.0", 0, "Ethernet", lid=0, open_to_pod=False),
    )
    return Machine((gpu, other), nics)


def no_fabric() -> Machine:
    """A machine with a GPU and no RDMA device."""
    return Machine((FakeGpu("pci0000:16 0000:16:01.0 0000:17:00.0", 0, 0),))
