"""Leader election: one works, the other takes over."""

import asyncio
from typing import Any

import pytest
from deadlines import patience

from tandem_operator.errors import ClusterError, LeadershipLost
from tandem_operator.runtime.leader import Leader, LeaseTimes
from tandem_operator.tests.memory_cluster import MemoryCluster
from tandem_operator.tests.polling import until

TIMES = LeaseTimes(duration=0.3, renew_deadline=0.15, retry=0.02)


def make(cluster: Any, identity: str, times: LeaseTimes = TIMES) -> tuple[Leader, list[bool]]:
    changes: list[bool] = []
    return Leader(cluster, "ns", "lease", identity, changes.append, times), changes


def holder(cluster: MemoryCluster) -> str:
    return str(cluster.objects[("Lease", "ns", "lease")]["spec"]["holderIdentity"])


async def test_the_first_one_leads_and_renews() -> None:
    cluster = MemoryCluster()
    leader, changes = make(cluster, "a")
    await leader.acquire()
    first = cluster.objects[("Lease", "ns", "lease")]["spec"]["renewTime"]
    keep = asyncio.create_task(leader.keep())
    await until(lambda: cluster.objects[("Lease", "ns", "lease")]["spec"]["renewTime"] != first)
    keep.cancel()
    assert changes == [True]


async def test_a_standby_waits_and_takes_over_from_a_dead_leader() -> None:
    cluster = MemoryCluster()
    first, _ = make(cluster, "a")
    await first.acquire()
    keep = asyncio.create_task(first.keep())
    second, changes = make(cluster, "b", LeaseTimes(1.0, 0.5, 0.02))
    cluster.objects[("Lease", "ns", "lease")]["spec"]["leaseDurationSeconds"] = 1
    waiting = asyncio.create_task(second.acquire())
    await until(lambda: len(cluster.calls) > 8)
    assert not changes
    keep.cancel()
    async with asyncio.timeout(patience(5)):
        await waiting
    assert holder(cluster) == "b"
    spec = cluster.objects[("Lease", "ns", "lease")]["spec"]
    assert spec["leaseTransitions"] == 2


async def test_a_released_lease_is_free_at_once() -> None:
    cluster = MemoryCluster()
    first, changes = make(cluster, "a", LeaseTimes(100, 50, 0.02))
    await first.acquire()
    await first.release()
    assert changes == [True, False]
    second, _ = make(cluster, "b", LeaseTimes(100, 50, 0.02))
    async with asyncio.timeout(patience(5)):
        await second.acquire()
    assert holder(cluster) == "b"


async def test_a_leader_whose_lease_was_taken_must_end() -> None:
    cluster = MemoryCluster()
    leader, changes = make(cluster, "a")
    await leader.acquire()
    cluster.objects[("Lease", "ns", "lease")]["spec"]["holderIdentity"] = "thief"
    async with asyncio.timeout(patience(5)):
        with pytest.raises(LeadershipLost):
            await leader.keep()
    assert changes == [True, False]


async def test_a_leader_pauses_while_the_api_server_is_away_and_goes_on() -> None:
    cluster = MemoryCluster()
    leader, changes = make(cluster, "a")
    await leader.acquire()
    keep = asyncio.create_task(leader.keep())
    cluster.fail["get"] = ClusterError(0, "away")
    await until(lambda: changes == [True, False])
    assert not leader.leading
    cluster.fail.clear()
    await until(lambda: changes == [True, False, True])
    keep.cancel()


async def test_acquiring_survives_errors() -> None:
    cluster = MemoryCluster()
    cluster.fail["get"] = ClusterError(0, "away")
    leader, changes = make(cluster, "a")
    waiting = asyncio.create_task(leader.acquire())
    await until(lambda: len(cluster.calls) > 2)
    cluster.fail.clear()
    async with asyncio.timeout(patience(5)):
        await waiting
    assert changes == [True]
