"""The cluster's nodes and devices are read now and then, for all services together."""

from collections import Counter
from typing import Any

from tandem_operator.errors import ClusterError
from tandem_operator.facts.observed import Claimable
from tandem_operator.observe.fabric import FABRIC_SECONDS, FabricObserver


class Lists:
    """An API server's lists, and how often each was asked for."""

    def __init__(self) -> None:
        self.names = ["node-0"]
        self.status = 200
        self.num_lists: Counter[str] = Counter()

    async def list(self, kind: str) -> list[dict[str, Any]]:
        self.num_lists[kind] += 1
        if self.status != 200:
            raise ClusterError(self.status, "no")
        return [{"metadata": {"name": name}} for name in self.names if kind != "ResourceSlice"]


async def test_services_share_a_look_until_it_is_old_or_a_spec_has_changed() -> None:
    lists, now = Lists(), [0.0]
    fabric = FabricObserver(lists, lambda: now[0])  # type: ignore[arg-type]
    for _ in range(20):
        assert len(await fabric.nodes(fresh=False) or ()) == 1
        found = await fabric.claimable(fresh=False)
        assert found == Claimable((), frozenset({"node-0"}))
    assert lists.num_lists == {"Node": 1, "ResourceSlice": 1, "DeviceClass": 1}
    lists.names.append("node-1")
    assert len(await fabric.nodes(fresh=False) or ()) == 1
    assert len(await fabric.nodes(fresh=True) or ()) == 2
    now[0] = FABRIC_SECONDS
    lists.names.append("node-2")
    assert len(await fabric.nodes(fresh=False) or ()) == 3
    assert lists.num_lists["Node"] == 3


async def test_what_may_not_be_read_is_not_asked_for_in_each_pass_either() -> None:
    lists = Lists()
    lists.status = 403
    fabric = FabricObserver(lists, lambda: 0.0)  # type: ignore[arg-type]
    for _ in range(3):
        assert await fabric.nodes(fresh=False) is None
        assert await fabric.claimable(fresh=False) is None
    assert lists.num_lists == {"Node": 1, "ResourceSlice": 1}
