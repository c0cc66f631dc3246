"""What Auto chooses on nodes modelled on real platforms, and what it writes into a worker's pod."""

import json
from pathlib import Path
from typing import Any

import pytest

from tandem_operator.api.rdma import Rdma, RdmaMode
from tandem_operator.facts.observed import Claimable, DeviceView, NodeView, PoolView
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.manifests.worker import Blueprint, build_worker_pod
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.wiring import choose_wiring
from tandem_operator.tests.facts import make_observed, make_spec

SNAPSHOTS = Path(__file__).parent / "rdma_platforms"
GPUS = {"nvidia.com/gpu": 8}
RAILS = tuple(f"rdma-{n}" for n in range(8))
GKE = {f"networking.gke.io.networks/{rail}": 1 for rail in RAILS}
DRANET = Claimable(
    tuple(
        DeviceView(
            node,
            "dra.net",
            f"nic-{n}",
            {
                "dra.net/rdma": True,
                "dra.net/ifName": f"gpu{n}rdma0",
                "resource.kubernetes.io/pcieRoot": f"pci0000:{n}6",
            },
        )
        for node in ("n1", "n2")
        for n in range(8)
    ),
    frozenset({"dranet", "gpu.nvidia.com"}),
)
EMPTY = Claimable()


def node(resources: dict[str, int], networks: tuple[str, ...] = ()) -> tuple[NodeView, ...]:
    """Two nodes of a kind beside one of the control plane."""
    made = (NodeView(name, True, {**GPUS, **resources}, networks) for name in ("n1", "n2"))
    return (*made, NodeView("control", True, {}))


PLATFORMS: dict[str, tuple[tuple[NodeView, ...], Claimable, dict[str, Any], RdmaMode]] = {
    "aks": (node({"rdma/ib": 1}), EMPTY, {}, RdmaMode.DEVICE_PLUGIN),
    "coreweave": (
        node({"rdma/ib": 100}),
        EMPTY,
        {"placement": {"sameFabricKey": "ib.coreweave.cloud/fabric"}},
        RdmaMode.DEVICE_PLUGIN,
    ),
    "eks": (node({"vpc.amazonaws.com/efa": 32}), EMPTY, {}, RdmaMode.EFA),
    "gke": (
        node(GKE | {"networking.gke.io.networks/gvnic-1": 1}, ("default", "gvnic-1", *RAILS)),
        EMPTY,
        {},
        RdmaMode.GKE,
    ),
    "openshift": (
        node({"openshift.io/rail0": 8}),
        EMPTY,
        {
            "networks": [{"name": "rail0", "namespace": "sriov"}],
            "resource": {"name": "openshift.io/rail0"},
        },
        RdmaMode.MULTUS,
    ),
    "infiniband": (node({"rdma/hca_shared_devices_a": 63}), EMPTY, {}, RdmaMode.DEVICE_PLUGIN),
    "dra": (node({"rdma/ib": 8}), DRANET, {}, RdmaMode.DRA),
    "none": (node({}), EMPTY, {}, RdmaMode.NONE),
}


def choose(name: str, recorded: RdmaMode | None = None) -> tuple[Rdma, Wiring]:
    nodes, claimable, fields, _ = PLATFORMS[name]
    rdma = Rdma.model_validate(fields)
    return rdma, choose_wiring(
        rdma, nodes, 1, recorded, ("Nixl",), claimable, libfabric_transports=("Nixl",)
    )


def built(name: str) -> dict[str, Any]:
    """The parts of a decode worker's pod that the wiring decides."""
    rdma, wiring = choose(name)
    spec = make_spec(
        rdma=rdma.to_manifest(), decode={"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    )
    observed = make_observed(spec, pools=Pair(None, PoolView("qwen-decode", "1", 1, 1, 1)))
    pod = build_worker_pod(observed, spec, Blueprint(Role.DECODE, "qwen-decode-a", "r1", wiring))
    (container,) = pod["spec"]["containers"]
    prefixes = ("UCX_", "NCCL_", "MOONCAKE_", "MC_", "FI_", "TANDEM_NIC")
    notes = pod["metadata"]["annotations"]
    return {
        "mode": str(wiring.mode),
        "annotations": {key: notes[key] for key in notes if "tandem.dev" not in key},
        "env": {
            item["name"]: item["value"]
            for item in container["env"]
            if item["name"].startswith(prefixes)
        },
        "resources": container["resources"],
        "capabilities": container["securityContext"]["capabilities"].get("add", []),
        "claims": pod["spec"].get("resourceClaims", []),
        "affinity": pod["spec"].get("affinity", {}),
        "shared memory": pod["spec"]["volumes"][0],
        "memlock is checked": "initContainers" in pod["spec"],
    }


@pytest.mark.parametrize("name", PLATFORMS)
def test_auto_on_a_real_platform(name: str) -> None:
    _, wiring = choose(name)
    assert wiring.mode is PLATFORMS[name][-1]
    assert not wiring.problem
    assert built(name) == json.loads((SNAPSHOTS / f"{name}.json").read_text())


def test_each_gpu_gets_its_share_of_the_efa_devices() -> None:
    _, wiring = choose("eks")
    assert [wiring.pieces(gpus) for gpus in (1, 2, 8)] == [4, 8, 32]


def test_auto_takes_no_efa_devices_that_no_transport_can_use() -> None:
    nodes, claimable, _, _ = PLATFORMS["eks"]
    for recorded in (None, RdmaMode.EFA):
        wiring = choose_wiring(Rdma(), nodes, 1, recorded, ("Nixl",), claimable)
        assert wiring.mode is RdmaMode.NONE
    asked = choose_wiring(Rdma(mode=RdmaMode.EFA), nodes, 1, None, ("Nixl",), claimable)
    assert (asked.mode, asked.problem) == (RdmaMode.EFA, "")
    assert "no transport of this release speaks libfabric" in asked.note


def test_efa_keeps_prefill_and_decode_apart() -> None:
    (term,) = built("eks")["affinity"]["podAntiAffinity"].values()
    assert term[0]["labelSelector"]["matchLabels"]["tandem.dev/role"] == "prefill"


def test_gke_attaches_as_many_rdma_networks_as_a_worker_has_gpus() -> None:
    nodes, claimable, _, _ = PLATFORMS["gke"]
    wiring = choose_wiring(
        Rdma(), nodes, 4, None, ("Nixl",), claimable, libfabric_transports=("Nixl",)
    )
    assert [network.name for network in wiring.networks] == [f"rdma-{n}" for n in range(4)]


def test_a_choice_on_record_stands_while_nodes_offer_it() -> None:
    _, wiring = choose("dra", RdmaMode.DEVICE_PLUGIN)
    assert (wiring.mode, wiring.resource) == (RdmaMode.DEVICE_PLUGIN, "rdma/ib")
    _, wiring = choose("aks", RdmaMode.DRA)
    assert wiring.mode is RdmaMode.DEVICE_PLUGIN


@pytest.mark.parametrize("name", ["eks", "gke", "dra"])
def test_what_only_a_cordoned_node_offers_is_not_taken(name: str) -> None:
    nodes, _, _, _ = PLATFORMS[name]
    cordoned = tuple(NodeView(one.name, False, one.resources, one.networks) for one in nodes)
    wiring = choose_wiring(
        Rdma(), cordoned, 1, None, ("Nixl",), Claimable(), libfabric_transports=("Nixl",)
    )
    assert wiring.mode is RdmaMode.NONE
    assert "no node offers RDMA devices" in wiring.note


def test_auto_attaches_named_networks_as_the_platform_does() -> None:
    rdma = Rdma.model_validate({"networks": [{"name": "rdma-0"}]})
    gke, claimable, _, _ = PLATFORMS["gke"]
    assert (
        choose_wiring(rdma, gke, 1, None, ("Nixl",), claimable, libfabric_transports=("Nixl",)).mode
        is RdmaMode.GKE
    )
    plain = PLATFORMS["none"][0]
    assert (
        choose_wiring(
            rdma, plain, 1, None, ("Nixl",), claimable, libfabric_transports=("Nixl",)
        ).mode
        is RdmaMode.MULTUS
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": "Efa"}, "vpc.amazonaws.com/efa, which rdma.mode Efa needs"),
        ({"mode": "Gke", "networks": [{"name": "rdma-0"}]}, "correct rdma.networks"),
        (
            {"mode": "Multus", "networks": [{"name": "a"}], "resource": {"name": "o/r"}},
            "no schedulable node offers o/r, which rdma.mode Multus needs",
        ),
    ],
)
def test_what_is_missing_names_field_and_remedy(fields: dict[str, Any], words: str) -> None:
    wiring = choose_wiring(Rdma.model_validate(fields), PLATFORMS["none"][0], 1)
    assert words in wiring.problem
    assert "rdma.mode: None" in wiring.problem
