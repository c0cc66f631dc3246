"""Each check on a node made of files: what is well, what is not, and the remedy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tandem_engine.doctor import libraries
from tandem_engine.doctor.check import Check
from tandem_engine.doctor.examine import examine, report, ruled_out, troubles
from tandem_engine.doctor.limits import Space
from tandem_engine.fabric.tests.machines import (
    Machine,
    bare_infiniband,
    eks_p5,
    gke_a3_ultra,
    no_fabric,
    openshift_sriov,
    roce,
)
from tandem_engine.fabric.tests.sysfs_tree import FakeGpu, FakeNic, build_tree

GIB = 1 << 30
ROOMY = Space(64 * GIB, 64 * GIB)
WELL: dict[str, str] = {
    "proc/self/limits": "Max locked memory         unlimited            unlimited            bytes",
    "proc/self/status": "CapEff:\t0000000000000000\nCpus_allowed_list:\t0-127",
    "proc/meminfo": "HugePages_Total:    4096\nHugePages_Free:     4000",
    "proc/sys/kernel/osrelease": "6.8.0-40-generic",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.1",
    "sys/devices/system/node/node0/cpulist": "0-63",
    "sys/devices/system/node/node1/cpulist": "64-127",
    "sys/class/net/eth0/mtu": "9000",
    "sys/class/net/veth0/mtu": "100",
    "proc/net/route": "Iface\tDestination\tGateway\neth0\t00000000\t0100\nveth0\t0A01\t0000",
    "dev/nvidiactl": "",
    "dev/nvidia-uvm": "",
    "dev/infiniband/rdma_cm": "",
    "dev/shm/.keep": "",
}
"""Whatever else a node without faults has; a test leaves out or changes one of them."""


def make_node(
    root: Path, machine: Machine, changes: Mapping[str, str | None] | None = None
) -> Path:
    """The node's files below `root`; None leaves a file out."""
    build_tree(root, machine.gpus, machine.nics)
    for name, text in {**WELL, **(changes or {})}.items():
        if text is not None:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
    return root


def check(root: Path, *, space: Space = ROOMY, **options: Any) -> list[Check]:
    options = {"environ": {}, "load": lambda module: "", **options}
    return examine(root, space_of=lambda folder: space, **options)


def faults(checks: list[Check]) -> list[tuple[str, str, str]]:
    return [(each.name, each.subject, each.verdict) for each in checks if each.verdict != "ok"]


def one(checks: list[Check], name: str) -> Check:
    (found,) = [each for each in checks if each.name == name]
    return found


@pytest.mark.parametrize("machine", [gke_a3_ultra(), openshift_sriov(), eks_p5(), no_fabric()])
def test_a_node_without_faults(tmp_path: Path, machine: Machine) -> None:
    checks = check(make_node(tmp_path, machine))
    # One NIC of OpenShift's GPU is below another root port; every other GPU has one beside it.
    assert set(faults(checks)) <= {("distance", "0000:37:00.0", "warn")}
    assert report(checks)["ok"] is True
    assert one(checks, "gpu").verdict == "ok"


def test_a_machine_with_nothing_is_well_and_says_what_it_does_without(tmp_path: Path) -> None:
    bare = {name: None for name in WELL if name.startswith("dev/")}
    checks = check(make_node(tmp_path, Machine(), {**bare, "dev/shm/.keep": ""}))
    assert not faults(checks)
    assert "CPU" in one(checks, "gpu").finding
    assert "no RDMA device" in one(checks, "rdma").finding


NIC = FakeNic("mlx5_0", "pci0000:16 0000:16:01.0 0000:17:00.0", 0)
ETHERNET = FakeNic("mlx5_0", NIC.path, 0, "Ethernet", lid=0, gids=roce(1))
LIMIT = "Max locked memory         {0}             {0}             bytes"
GPU = FakeGpu("pci0000:16 0000:16:01.0 0000:18:00.0", 0, 0)
FAR = FakeGpu("pci0000:b6 0000:b6:01.0 0000:b7:00.0", 1, 0)


@pytest.mark.parametrize(
    ("machine", "changes", "fault", "words"),
    [
        (no_fabric(), {"dev/nvidia-uvm": None}, ("gpu", "fail"), "container toolkit"),
        (
            Machine(nics=(FakeNic("mlx5_0", NIC.path, 0, open_to_pod=False),)),
            {},
            ("rdma", "warn"),
            "none of them is open here: set rdma.mode",
        ),
        (Machine(nics=(NIC,)), {"dev/infiniband/rdma_cm": None}, ("rdma", "warn"), "device plugin"),
        (
            Machine(nics=(FakeNic("mlx5_0", NIC.path, 0, lid=0),)),
            {},
            ("link", "fail"),
            "without a LID: start a subnet manager",
        ),
        (
            Machine(nics=(FakeNic("mlx5_0", NIC.path, 0, "Ethernet", state="1: DOWN"),)),
            {},
            ("link", "fail"),
            "port 1 is DOWN: check the cable",
        ),
        (
            Machine(nics=(FakeNic("mlx5_0", NIC.path, 0, "Ethernet", gids={}),)),
            {},
            ("gid", "fail"),
            "none of 0 GIDs is a routable one",
        ),
        (
            Machine(nics=(ETHERNET,)),
            {"sys/class/net/eth0/mtu": "1500"},
            ("mtu", "warn"),
            "1024 bytes at most: set the MTU",
        ),
        (
            Machine(gpus=(GPU,), nics=(NIC,)),
            {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535"},
            ("peer memory", "warn"),
            "modprobe nvidia_peermem",
        ),
        (
            Machine(gpus=(GPU,), nics=(NIC,)),
            {"proc/sys/kernel/osrelease": "5.4.0"},
            ("peer memory", "warn"),
            "host's memory",
        ),
        (Machine(gpus=(FAR,), nics=(NIC,)), {}, ("distance", "warn"), "mlx5_0 at SYS"),
        (
            Machine(gpus=(FAR,)),
            {"proc/self/status": "CapEff:\t0\nCpus_allowed_list:\t0-7,9"},
            ("numa", "warn"),
            "(0-7,9) are of other nodes",
        ),
        (
            Machine(nics=(NIC,)),
            {"proc/self/limits": LIMIT.format(8 << 20)},
            ("memlock", "fail"),
            "only 8 MiB may be locked, so RDMA devices can't use the KV cache: give the",
        ),
        (
            Machine(nics=(FakeNic("rdmap0s0", NIC.path, 0, "Unspecified", driver="efa"),)),
            {"proc/meminfo": "HugePages_Total:    100\nHugePages_Free:     7"},
            ("hugepages", "warn"),
            "7 of 100 are free, but EFA's library wants 512: request hugepages-2Mi",
        ),
        (Machine(), {"dev/shm/.keep": None}, ("shared memory", "fail"), "emptyDir at /dev/shm"),
        (Machine(), {"sys/class/net/eth0/mtu": "576"}, ("mtu", "warn"), "576 bytes: set it"),
    ],
)
def test_each_fault_is_found_alone_with_its_remedy(
    tmp_path: Path,
    machine: Machine,
    changes: dict[str, str | None],
    fault: tuple[str, str],
    words: str,
) -> None:
    root = make_node(tmp_path, machine, changes)
    found = [each for each in check(root) if each.verdict != "ok"]
    # A small MTU of the interface is a fault of TCP and of RoCE over it.
    assert {(each.name, each.verdict) for each in found} == {fault}
    assert any(words in each.sentence for each in found), found


def test_peer_memory_by_the_module_or_by_the_open_driver(tmp_path: Path) -> None:
    machine = Machine(gpus=(GPU,), nics=(NIC,))
    closed = {"proc/driver/nvidia/version": "NVRM version: closed"}
    loaded = {**closed, "sys/module/nvidia_peermem/refcnt": "0"}
    both = [
        check(make_node(tmp_path / "a", machine)),
        check(make_node(tmp_path / "b", machine, loaded)),
    ]
    assert [one(checks, "peer memory").subject for checks in both] == ["dma-buf", "nvidia_peermem"]
    assert [one(checks, "peer memory").verdict for checks in both] == ["ok", "ok"]


def test_a_nic_that_may_not_be_used_is_not_near(tmp_path: Path) -> None:
    far = FakeNic("mlx5_1", "pci0000:b6 0000:b6:01.0 0000:b7:00.0", 1)
    root = make_node(tmp_path, Machine(gpus=(GPU,), nics=(NIC, far)))
    assert one(check(root), "distance").finding == "mlx5_0 at PIX: below one PCIe root"
    only = one(check(root, environ={"TANDEM_NICS": "^mlx5_0"}), "distance")
    assert only.finding.startswith("mlx5_1 at SYS")


def test_the_capability_lifts_the_limit_of_locked_memory(tmp_path: Path) -> None:
    machine, few = Machine(nics=(NIC,)), {"proc/self/limits": LIMIT.format(8 << 20)}
    may = {**few, "proc/self/status": "CapEff:\t0000000000004000\n"}
    assert one(check(make_node(tmp_path / "a", machine, may)), "memlock").verdict == "ok"
    assert one(check(make_node(tmp_path / "b", machine, few)), "memlock").verdict == "fail"


def test_one_dead_link_of_several_is_no_failure(tmp_path: Path) -> None:
    checks = check(make_node(tmp_path, bare_infiniband()))
    assert ("link", "mlx5_8", "warn") in faults(checks)
    assert report(checks)["ok"] is True


def test_little_shared_memory(tmp_path: Path) -> None:
    root = make_node(tmp_path, Machine())
    found = one(check(root, space=Space(64 << 20, 1 << 20)), "shared memory")
    assert (found.verdict, found.finding) == ("warn", "1 MiB of 64 MiB are free")
    assert "rdma.sharedMemory" in found.remedy


def test_a_ring_folder_without_room_rules_shm_out(tmp_path: Path) -> None:
    root = make_node(tmp_path, Machine())
    environ = {"TANDEM_SHM_DIR": "/dev/shm"}
    full = check(root, space=Space(2 * GIB, 1 << 20), environ=environ)
    assert ruled_out(full) == {
        "shm": "1 MiB are free, but a session of the transport shm needs 64 MiB: remove what other"
        " processes left there, or make it larger"
    }
    assert not ruled_out(check(root, environ=environ))
    gone = check(root, environ={"TANDEM_SHM_DIR": "/nowhere"})
    assert "not a folder that this process may write" in ruled_out(gone)["shm"]


def test_a_library_that_is_missing_matters_to_who_asks_for_it(tmp_path: Path) -> None:
    root = make_node(tmp_path, Machine())

    def load(module: str) -> str:
        return f"there is no module {module}" if module.startswith("nixl") else ""

    def named(wanted: Any) -> dict[str, Check]:
        return {each.subject: each for each in check(root, load=load, wanted=wanted)}

    assert (named("Auto")["nixl"].verdict, named("Auto")["mooncake"].verdict) == ("ok", "ok")
    asked = named("Nixl")["nixl"]
    assert (asked.verdict, asked.rules_out) == ("fail", ("nixl",))
    assert "install tandem-inference[nixl]" in asked.remedy


def test_a_library_that_breaks_at_its_import_is_named_with_its_version() -> None:
    broken = list(
        libraries.check_libraries(
            "Auto",
            lambda module: "ImportError: libcudart.so.13",
            lambda package: f"{package} 1.1" if package == "nixl-cu13" else "",
        )
    )
    nixl, mooncake = broken
    assert nixl.finding == "nixl-cu13 1.1 is installed, but ImportError: libcudart.so.13"
    assert (nixl.verdict, mooncake.verdict) == ("fail", "ok")
    assert "nixl" in ruled_out(broken)


def test_one_of_the_packages_of_nixl_is_enough() -> None:
    def load(module: str) -> str:
        return "" if module == "nixl_cu13" else f"there is no module {module}"

    found = next(libraries.check_libraries("Nixl", load, lambda package: ""))
    assert (found.subject, found.verdict) == ("nixl", "ok")


def test_a_module_is_tried_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "breaks_at_import.py").write_text("raise ImportError('no such library')")
    (tmp_path / "dies_at_import.py").write_text("import os; os._exit(7)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert libraries.import_module("breaks_at_import") == "ImportError: no such library"
    assert libraries.import_module("dies_at_import") == "importing it ended with code 7"
    assert libraries.import_module("not_there_at_all") == "there is no module not_there_at_all"
    assert libraries.import_module("json") == ""


def test_a_worker_is_told_of_what_matters_to_its_transport(tmp_path: Path) -> None:
    few = {"proc/self/limits": LIMIT.format(8 << 20)}
    checks = check(
        make_node(tmp_path, Machine(nics=(NIC,)), few),
        environ={"TANDEM_SHM_DIR": "/nowhere"},
    )
    assert [each.name for each in troubles(checks, "Auto")] == ["memlock", "shared memory"]
    assert [each.name for each in troubles(checks, "Nixl")] == ["memlock"]
    assert [each.name for each in troubles(checks, "Shm")] == ["shared memory"]
    assert not troubles(checks, "Tcp")
    assert set(ruled_out(checks)) == {"nixl", "mooncake", "cudaIpc", "cudaIpcRing", "shm"}
    document = report(checks)
    assert document["ok"] is False
    (memlock,) = [each for each in document["checks"] if each["name"] == "memlock"]
    assert memlock["rules_out"] == ("nixl", "mooncake")
