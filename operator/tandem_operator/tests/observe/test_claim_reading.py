"""Whose a service is, from its status and the Lease that it names."""

from typing import Any

import pytest

from tandem_operator.errors import ClusterError
from tandem_operator.facts.observed import Claim
from tandem_operator.observe.claims import LOOK_SECONDS, STALE_SECONDS, ClaimReader
from tandem_operator.tests.memory_cluster import MemoryCluster

ME, OTHER = "mine/operator", "theirs/operator"
FORBIDDEN = ClusterError(403, "forbidden")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cluster() -> MemoryCluster:
    return MemoryCluster()


def renew(cluster: MemoryCluster, at: str, holder: str = "pod-1") -> None:
    meta = {"name": "operator", "namespace": "theirs"}
    spec = {"holderIdentity": holder, "renewTime": at}
    cluster.put({"kind": "Lease", "metadata": meta, "spec": spec})


def reader(cluster: Any, clock: Clock, *, everywhere: bool = True) -> ClaimReader:
    return ClaimReader(cluster, ME, everywhere=everywhere, clock=clock)


async def test_what_nobody_claims_is_free_and_what_we_claim_is_ours(
    cluster: MemoryCluster, clock: Clock
) -> None:
    claims = reader(cluster, clock)
    assert (await claims.read("u", "")).claim is Claim.FREE
    assert (await claims.read("u", ME)).claim is Claim.MINE
    assert cluster.calls == [], "at rest no Lease is read"


async def test_a_living_operator_keeps_what_it_serves(cluster: MemoryCluster, clock: Clock) -> None:
    claims = reader(cluster, clock)
    for second in range(100):
        clock.now += 1
        renew(cluster, str(second))
        found = await claims.read("u", OTHER)
        assert (found.claim, found.holder, found.told) == (Claim.OTHERS, OTHER, second > 0)
    assert len(cluster.calls) <= 100 / LOOK_SECONDS + 1


async def test_what_a_dead_operator_served_is_free_after_a_while(
    cluster: MemoryCluster, clock: Clock
) -> None:
    claims = reader(cluster, clock)
    # Its clock doesn't matter, only that its Lease changes.
    renew(cluster, "1999-01-01T00:00:00Z", holder="")
    assert (await claims.read("u", OTHER)).claim is Claim.OTHERS
    clock.now += STALE_SECONDS - 1
    assert (await claims.read("u", OTHER)).claim is Claim.OTHERS
    clock.now += 2
    assert (await claims.read("u", OTHER)).claim is Claim.FREE


async def test_the_change_of_a_leader_is_no_death(cluster: MemoryCluster, clock: Clock) -> None:
    claims = reader(cluster, clock)
    renew(cluster, "1")
    await claims.read("u", OTHER)
    clock.now += STALE_SECONDS - 1
    renew(cluster, "1", holder="pod-2")
    assert (await claims.read("u", OTHER)).claim is Claim.OTHERS
    clock.now += STALE_SECONDS - 1
    assert (await claims.read("u", OTHER)).claim is Claim.OTHERS


async def test_an_operator_without_a_lease_is_gone(cluster: MemoryCluster, clock: Clock) -> None:
    assert (await reader(cluster, clock).read("u", OTHER)).claim is Claim.FREE


async def test_two_that_cannot_see_each_other_do_not_take_turns(
    cluster: MemoryCluster, clock: Clock
) -> None:
    cluster.fail["get"] = FORBIDDEN
    everywhere, given = reader(cluster, clock), reader(cluster, clock, everywhere=False)
    found = await everywhere.read("u", OTHER)
    assert found.claim is Claim.OTHERS
    assert "can't be read" in found.why
    assert "--subresource=status" in found.why
    # An operator with namespaces of its own takes a service of one that it can't see, ...
    assert (await given.read("u", OTHER)).claim is Claim.FREE
    assert (await given.read("u", ME)).claim is Claim.MINE
    # ... but once: if the other one takes it back, it lives.
    assert (await given.read("u", OTHER)).claim is Claim.OTHERS
    given.forget("u")
    assert (await given.read("u", OTHER)).claim is Claim.FREE


async def test_an_api_server_that_fails_says_nothing_about_an_owner(
    cluster: MemoryCluster, clock: Clock
) -> None:
    cluster.fail["get"] = ClusterError(500, "etcd")
    with pytest.raises(ClusterError):
        await reader(cluster, clock).read("u", OTHER)
