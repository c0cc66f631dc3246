"""Claims: what their templates ask for, and how the pods use them."""

from typing import Any

import pytest

from tandem_operator.api.rdma import Rdma, RdmaMode
from tandem_operator.facts.child import ChildView
from tandem_operator.facts.observed import Claimable, DeviceView, PoolView
from tandem_operator.manifests.claims import build_claim, build_claim_templates
from tandem_operator.manifests.fleet import build_owner
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.manifests.worker import Blueprint, build_worker_pod
from tandem_operator.pair import Pair, Role
from tandem_operator.plan import reconcile
from tandem_operator.plan.rails import choose_rails
from tandem_operator.plan.wiring import choose_wiring
from tandem_operator.tests.facts import NOW, make_observed, make_pod, make_spec

CLASSES = frozenset({"dranet", "gpu.nvidia.com"})
POOLS = Pair.build(lambda role: PoolView(f"qwen-{role}", str(role), 1, 1, 1))


def nic(node: str, rail: str) -> DeviceView:
    return DeviceView(node, "dra.net", rail, {"dra.net/ifName": rail})


CLAIMABLE = Claimable(
    (nic("a", "r0"), nic("a", "r1"), nic("b", "r0"), nic("b", "r1"), nic("b", "r2")), CLASSES
)


def wire(num_gpus: int = 0, claimable: Claimable | None = CLAIMABLE, **claim: Any) -> Wiring:
    rdma = Rdma.model_validate({"mode": "Dra", "claim": claim})
    return choose_wiring(rdma, (), num_gpus, claimable=claimable)


def test_a_nic_for_each_gpu_on_its_pcie_root() -> None:
    devices = build_claim(wire(2), 2)["devices"]
    assert {one["name"]: one["exactly"]["deviceClassName"] for one in devices["requests"]} == {
        "nic-0": "dranet",
        "gpu-0": "gpu.nvidia.com",
        "nic-1": "dranet",
        "gpu-1": "gpu.nvidia.com",
    }
    assert devices["constraints"] == [
        {"requests": [f"gpu-{n}", f"nic-{n}"], "matchAttribute": "resource.kubernetes.io/pcieRoot"}
        for n in range(2)
    ]


@pytest.mark.parametrize(("num_gpus", "align"), [(0, "PcieRoot"), (2, "None")])
def test_gpus_stay_with_the_device_plugin_unless_they_are_aligned(
    num_gpus: int, align: str
) -> None:
    devices = build_claim(wire(num_gpus, alignWith=align), num_gpus)["devices"]
    assert [one["name"] for one in devices["requests"]] == ["nic-0", "nic-1"][: max(1, num_gpus)]
    assert "constraints" not in devices


def test_the_pod_uses_the_claim_instead_of_the_resource() -> None:
    limits = {"resources": {"limits": {"nvidia.com/gpu": "1", "cpu": "4"}}}
    spec = make_spec(rdma={"mode": "Dra", "claim": {}}, prefill=limits, decode=limits)
    observed = make_observed(spec, pools=POOLS)
    wiring = wire(1)
    templates = list(build_claim_templates(observed, spec, wiring, build_owner(observed)))
    pod = build_worker_pod(observed, spec, Blueprint(Role.DECODE, "qwen-decode-a", "r1", wiring))
    (used,) = pod["spec"]["resourceClaims"]
    assert used["resourceClaimTemplateName"] == templates[1]["metadata"]["name"]
    (container,) = pod["spec"]["containers"]
    assert container["resources"]["claims"] == [{"name": used["name"]}]
    assert container["resources"]["limits"] == {"cpu": "4"}
    # The worker runs on a GPU all the same.
    assert container["args"][container["args"].index("--device") + 1] == "cuda"


def test_another_claim_is_another_template() -> None:
    spec = make_spec(rdma={"mode": "Dra", "claim": {}})
    observed = make_observed(spec, pools=POOLS)
    owner = build_owner(observed)
    names = [
        [made["metadata"]["name"] for made in build_claim_templates(observed, spec, each, owner)]
        for each in (wire(), wire(), wire(deviceClass="other"))
    ]
    assert names[0] == names[1]
    assert not set(names[0]) & set(names[2])


def test_rails_are_those_that_most_nodes_are_on() -> None:
    wiring = wire(rails="SameAcrossRoles")
    assert wiring.rails in (("r0",), ("r1",))
    (request,) = build_claim(wiring, 0)["devices"]["requests"]
    (selector,) = request["exactly"]["selectors"]
    assert selector["cel"]["expression"] == (
        'has(device.attributes["dra.net"].ifName) &&'
        f' device.attributes["dra.net"].ifName == "{wiring.rails[0]}"'
    )
    assert wire(2, rails="SameAcrossRoles").rails == ("r0", "r1")


def test_services_spread_over_rails() -> None:
    chosen = {choose_rails(CLAIMABLE.devices, "dra.net/ifName", 1, seed) for seed in range(8)}
    assert chosen == {("r0",), ("r1",)}


@pytest.mark.parametrize(
    ("claimable", "claim", "words"),
    [
        (Claimable((), CLASSES), {}, "no ResourceSlice has a device"),
        (CLAIMABLE, {"railAttribute": "dra.net/rail"}, "rdma.claim.railAttribute"),
        (None, {}, "can't read ResourceSlices in a namespaced installation"),
    ],
)
def test_without_a_known_rail_no_worker_starts(
    claimable: Claimable | None, claim: dict[str, str], words: str
) -> None:
    fields = {"mode": "Dra", "claim": {"rails": "SameAcrossRoles", **claim}}
    spec = make_spec(rdma=fields)
    plan = reconcile(make_observed(spec, pools=POOLS, claimable=claimable), NOW)
    assert not plan.create
    assert plan.status is not None
    told = {item["type"]: item for item in plan.status["conditions"]}
    assert words in told["CapacityUnavailable"]["message"]


def test_a_missing_class_names_field_and_remedy() -> None:
    for num_gpus, found, field in ((0, {"gpu.nvidia.com"}, "deviceClass"), (1, {"dranet"}, "gpuD")):
        problem = wire(num_gpus, Claimable(CLAIMABLE.devices, frozenset(found))).problem
        assert "there is no DeviceClass" in problem
        assert f"rdma.claim.{field}" in problem
        assert "rdma.mode: None" in problem


def test_who_may_not_look_makes_claims_all_the_same() -> None:
    wiring = wire(claimable=None)
    assert (wiring.mode, wiring.problem, wiring.blocked) == (RdmaMode.DRA, "", False)


def test_a_template_is_kept_while_a_pod_uses_it() -> None:
    owners = frozenset({"uid-qwen"})
    old = ChildView("ResourceClaimTemplate", "qwen-decode-old", "uid-old", owners)
    claims = [{"name": "fabric", "resourceClaimTemplateName": old.name}]
    pod = make_pod(manifest={"spec": {"resourceClaims": claims}})
    for pods, removed in (((pod,), False), ((), True)):
        observed = make_observed(make_spec(), pools=POOLS, pods=pods, children=(old,))
        plan = reconcile(observed, NOW)
        assert (old.name in {item.name for item in plan.remove}) is removed


def test_the_templates_are_made_that_new_pods_name() -> None:
    spec = make_spec(rdma={"mode": "Dra", "claim": {}})
    plan = reconcile(make_observed(spec, pools=POOLS, claimable=CLAIMABLE), NOW)
    made = [child for child in plan.apply if child["kind"] == "ResourceClaimTemplate"]
    assert [child["metadata"]["name"].rsplit("-", 1)[0] for child in made] == [
        "qwen-prefill",
        "qwen-decode",
    ]
    names = {pod["spec"]["resourceClaims"][0]["resourceClaimTemplateName"] for pod in plan.create}
    assert names == {child["metadata"]["name"] for child in made}
