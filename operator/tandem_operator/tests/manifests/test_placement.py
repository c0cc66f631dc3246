"""Affinity of workers: the fabric, and whether the roles share nodes."""

from typing import Any

import pytest

from tandem_operator.api.rdma import RdmaMode
from tandem_operator.manifests.placement import build_affinity
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.pair import Role
from tandem_operator.tests.facts import make_spec

ALWAYS = "requiredDuringSchedulingIgnoredDuringExecution"
WORKERS = {"tandem.dev/service": "qwen", "tandem.dev/worker": "true"}
NODE = "kubernetes.io/hostname"


def affinity(
    role: Role = Role.PREFILL, mode: RdmaMode = RdmaMode.NONE, **placement: str
) -> dict[str, Any]:
    spec = make_spec(rdma={"placement": placement})
    return build_affinity("qwen", spec, role, Wiring(mode))


def term(key: str, **labels: str) -> dict[str, Any]:
    return {"labelSelector": {"matchLabels": {**WORKERS, **labels}}, "topologyKey": key}


def test_any_leaves_it_to_the_scheduler() -> None:
    assert affinity() == affinity(roles="Any") == {}


@pytest.mark.parametrize(("role", "other"), [(Role.PREFILL, "decode"), (Role.DECODE, "prefill")])
def test_spread_keeps_off_the_nodes_of_the_other_role(role: Role, other: str) -> None:
    wanted = {"podAntiAffinity": {ALWAYS: [term(NODE, **{"tandem.dev/role": other})]}}
    assert affinity(role, roles="Spread") == affinity(role, RdmaMode.EFA) == wanted


def test_pack_puts_all_workers_on_one_node_and_the_first_anywhere() -> None:
    """A term that the pod itself meets doesn't hold the first one back."""
    assert affinity(roles="Pack") == {"podAffinity": {ALWAYS: [term(NODE)]}}


def test_the_fabric_and_the_roles_go_together() -> None:
    made = affinity(roles="Spread", sameFabricKey="example.com/fabric")
    assert made["podAffinity"] == {ALWAYS: [term("example.com/fabric")]}
    assert "podAntiAffinity" in made
    made = affinity(roles="Pack", sameFabricKey="example.com/fabric")
    assert made["podAffinity"] == {ALWAYS: [term("example.com/fabric"), term(NODE)]}
