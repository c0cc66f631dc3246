"""The NICs of each GPU, on nodes modelled on real ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem_engine.errors import ConfigError
from tandem_engine.fabric.environment import FabricChoice, choose_fabric
from tandem_engine.fabric.nic_map import candidates
from tandem_engine.fabric.pci import Distance, PciFunction
from tandem_engine.fabric.sysfs import read_fabric
from tandem_engine.fabric.tests import machines
from tandem_engine.fabric.tests.machines import Machine
from tandem_engine.fabric.tests.sysfs_tree import FakeGpu, FakeNic, build_tree

MACHINES: dict[str, Callable[[], Machine]] = {
    "aks": machines.aks_nd_h100_v5,
    "eks": machines.eks_p5,
    "gke": machines.gke_a3_ultra,
    "coreweave": machines.coreweave,
    "openshift": machines.openshift_sriov,
    "infiniband": machines.bare_infiniband,
    "none": machines.no_fabric,
}
SNAPSHOTS = Path(__file__).parent / "nic_maps"


def choose(root: Path, machine: Machine, **environ: str) -> FabricChoice:
    return choose_fabric(environ, build_tree(root, machine.gpus, machine.nics))


@pytest.mark.parametrize("name", MACHINES)
def test_the_map_of_a_real_platform(tmp_path: Path, name: str) -> None:
    made = choose(tmp_path, MACHINES[name]()).as_json()
    assert made == json.loads((SNAPSHOTS / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("pci0:00 a b c", "pci0:00 a b d", Distance.PIX),
        ("pci0:00 a b c e", "pci0:00 a b d", Distance.PXB),
        ("pci0:00 a", "pci0:00 b", Distance.PHB),
        ("pci0:00 a", "pci0:40 a", Distance.NODE),
    ],
)
def test_distances(first: str, second: str, distance: Distance) -> None:
    one, other = (PciFunction(f"{n}", tuple(p.split()), 0) for n, p in enumerate((first, second)))
    assert one.distance(other) is other.distance(one) is distance


def test_an_unknown_numa_node_is_near_to_nothing() -> None:
    one, other = (PciFunction(name, (name,), None) for name in ("a", "b"))
    assert one.distance(other) is Distance.SYS


def test_gpu_0_of_a_board_may_belong_to_mlx5_4(tmp_path: Path) -> None:
    one = machines.bare_infiniband()
    alone = Machine(
        (one.gpus[0], *(FakeGpu(gpu.path, gpu.numa, None) for gpu in one.gpus[1:])), one.nics
    )
    told = choose(tmp_path, alone).variables
    assert told["UCX_NET_DEVICES"] == "mlx5_4:1"
    assert told["NCCL_IB_HCA"] == "=mlx5_4:1"


def test_gpus_that_are_equally_near_divide_the_nics(tmp_path: Path) -> None:
    node = machines.aks_nd_h100_v5()
    chosen = choose(tmp_path, node).as_json()["gpus"].values()
    assert [item["use"] for item in chosen] == [[f"mlx5_ib{n}"] for n in range(8)]


def test_more_gpus_than_nics_share_them(tmp_path: Path) -> None:
    path = "pci0000:16 0000:16:01.0"
    gpus = tuple(FakeGpu(f"{path} 0000:17:0{n}.0", 0, n) for n in range(4))
    nics = tuple(FakeNic(f"mlx5_{n}", f"{path} 0000:18:0{n}.0", 0) for n in range(2))
    maps = choose(tmp_path, Machine(gpus, nics)).maps
    assert [item.chosen[0].name for item in maps] == ["mlx5_0", "mlx5_0", "mlx5_1", "mlx5_1"]


def test_a_dead_link_is_passed_over(tmp_path: Path) -> None:
    path = "pci0000:16 0000:16:01.0"
    dead = FakeNic("mlx5_0", f"{path} 0000:18:00.0", 0, state="1: DOWN")
    far = FakeNic("mlx5_1", "pci0000:b0 0000:b0:01.0 0000:b1:00.0", 1)
    told = choose(tmp_path, Machine((FakeGpu(f"{path} 0000:17:00.0", 0),), (dead, far)))
    assert told.variables["UCX_NET_DEVICES"] == "mlx5_1:1"


def test_names_are_ordered_as_people_count(tmp_path: Path) -> None:
    nics = tuple(FakeNic(f"mlx5_{n}", f"pci0000:{n:02x} 0000:{n:02x}:00.0", 0) for n in range(11))
    build_tree(tmp_path, (), nics)
    assert [nic.name for nic in read_fabric(tmp_path).nics] == [f"mlx5_{n}" for n in range(11)]


def test_what_the_user_set_stays(tmp_path: Path) -> None:
    told = choose(tmp_path, machines.gke_a3_ultra(), UCX_NET_DEVICES="mlx5_7:1").variables
    assert "UCX_NET_DEVICES" not in told
    assert "NCCL_IB_HCA" in told


def test_include_and_exclude_bound_the_choice(tmp_path: Path) -> None:
    node = machines.bare_infiniband()
    build_tree(tmp_path, node.gpus, node.nics)
    kept = choose_fabric({"TANDEM_NICS": "mlx5_0,mlx5_4"}, tmp_path)
    assert {nic.name for nic in kept.nics} == {"mlx5_0", "mlx5_4"}
    without = choose_fabric({"TANDEM_NICS": "^mlx5_0,mlx5_4"}, tmp_path)
    assert [nic.name for nic in without.nics] == [
        "mlx5_5",
        "mlx5_6",
        "mlx5_7",
        "mlx5_1",
        "mlx5_2",
        "mlx5_3",
    ]


def test_all_gives_every_nic_to_every_gpu(tmp_path: Path) -> None:
    node = machines.coreweave()
    build_tree(tmp_path, node.gpus, node.nics)
    assert len(choose_fabric({"TANDEM_NIC_MAP": "PerGPU"}, tmp_path).nics) == 4
    assert len(choose_fabric({"TANDEM_NIC_MAP": "All"}, tmp_path).nics) == 8


@pytest.mark.parametrize("variable", ["TANDEM_NICS", "TANDEM_NIC_MAP"])
def test_a_wrong_variable_is_named(tmp_path: Path, variable: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        choose_fabric({variable: "^,"}, tmp_path)


def test_a_pod_without_gpus_uses_all_that_can_carry_kv(tmp_path: Path) -> None:
    node = Machine((), machines.bare_infiniband().nics)
    assert choose(tmp_path, node).variables["MOONCAKE_DEVICE"].count(",") == 7


def test_a_machine_without_sysfs_has_nothing(tmp_path: Path) -> None:
    fabric = read_fabric(tmp_path / "nothing")
    assert (fabric.gpus, fabric.nics, candidates(fabric)) == ((), (), ())


def test_a_gpu_does_not_share_with_a_farther_one(tmp_path: Path) -> None:
    choice = choose(tmp_path, machines.openshift_sriov())
    assert [nic.name for nic in choice.nics] == ["mlx5_12", "mlx5_13"]
    # Its two virtual functions have RoCE v2 at 3 and at 5.
    assert not any("GID_INDEX" in name for name in choice.variables)


def test_ucx_keeps_its_interfaces_when_it_may_not_use_rdma(tmp_path: Path) -> None:
    node = machines.bare_infiniband()
    build_tree(tmp_path, node.gpus, node.nics)
    assert "UCX_NET_DEVICES" not in choose_fabric({"UCX_TLS": "tcp,sm"}, tmp_path).variables
    assert "UCX_NET_DEVICES" in choose_fabric({"UCX_TLS": "rc,ud,sm"}, tmp_path).variables


def test_a_named_nic_that_is_not_there_is_told_all_the_same(tmp_path: Path) -> None:
    told = choose_fabric({"TANDEM_NICS": "mlx5_10,mlx5_2"}, tmp_path).variables
    assert told["UCX_NET_DEVICES"] == "mlx5_2:1,mlx5_10:1"
    assert told["NCCL_IB_HCA"] == "=mlx5_2,mlx5_10"


@pytest.mark.parametrize(
    ("visible", "nics"),
    [("1", ["mlx5_5"]), ("0,2", ["mlx5_4", "mlx5_6"]), ("GPU-3", ["mlx5_7"])],
)
def test_only_visible_gpus_count(tmp_path: Path, visible: str, nics: list[str]) -> None:
    node = machines.bare_infiniband()
    build_tree(tmp_path, node.gpus, node.nics)
    choice = choose_fabric({"CUDA_VISIBLE_DEVICES": visible}, tmp_path)
    assert [nic.name for nic in choice.nics] == nics


def test_a_worker_that_hides_its_gpus_has_every_nic(tmp_path: Path) -> None:
    node = machines.bare_infiniband()
    build_tree(tmp_path, node.gpus, node.nics)
    assert len(choose_fabric({"CUDA_VISIBLE_DEVICES": ""}, tmp_path).nics) == 8
