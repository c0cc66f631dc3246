"""Address plans: ranges that never overlap, neither inside a cluster nor between two."""

from __future__ import annotations

from ipaddress import IPv4Network
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_local.errors import RequirementError
from tandem_local.nodes.addresses import CANDIDATES, AddressPlan, choose_plan
from tandem_local.spec import MAX_NODES


@pytest.fixture
def plan() -> AddressPlan:
    return AddressPlan(IPv4Network("10.200.0.0/16"))


def test_ranges_lie_in_the_base_and_apart(plan: AddressPlan) -> None:
    ranges = [plan.pods, plan.services, plan.fabric]
    assert all(part.subnet_of(plan.base) for part in ranges)
    assert not any(a.overlaps(b) for a, b in combinations(ranges, 2))


def test_every_node_has_its_own_addresses(plan: AddressPlan) -> None:
    nodes = [plan.node(i) for i in range(MAX_NODES)]
    subnets = [plan.pod_subnet(i) for i in range(MAX_NODES)]
    assert len(set(nodes)) == len(set(subnets)) == MAX_NODES
    assert all(node in plan.fabric and node != plan.host for node in nodes)
    assert all(subnet.subnet_of(plan.pods) for subnet in subnets)
    assert all(plan.pod_gateway(i) in subnets[i] for i in range(MAX_NODES))


def test_service_addresses_are_services(plan: AddressPlan) -> None:
    assert plan.dns in plan.services
    assert plan.api_service in plan.services
    assert plan.dns != plan.api_service
    assert plan.api == plan.node(0)
    assert plan.api_url == "https://10.200.255.1:6443"


def test_plan_survives_json(plan: AddressPlan) -> None:
    assert AddressPlan.from_json(plan.to_json()) == plan


@given(st.sets(st.sampled_from(CANDIDATES), max_size=len(CANDIDATES) - 1))
def test_the_choice_overlaps_with_nothing_taken(taken: set[IPv4Network]) -> None:
    assert choose_plan(taken).base not in taken
    assert choose_plan(taken, "some cluster").base not in taken


def test_clusters_that_start_together_choose_apart() -> None:
    chosen = {choose_plan([], f"cluster-{number}").base for number in range(8)}
    assert len(chosen) > 4


def test_a_wide_route_takes_all_candidates_below_it() -> None:
    with pytest.raises(RequirementError, match=r"no address range is free: .*: remove a cluster"):
        choose_plan([IPv4Network("10.0.0.0/8")])


def test_the_default_route_takes_nothing() -> None:
    assert choose_plan([IPv4Network("0.0.0.0/0")]).base == CANDIDATES[0]
