"""Reads what the whole cluster offers for moving KV: its nodes, and the devices to claim."""

import time
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from tandem_operator.clients.cluster import Cluster
from tandem_operator.errors import ClusterError, MissingError
from tandem_operator.facts.observed import Claimable, NodeView
from tandem_operator.observe.objects import read_devices, read_node

FABRIC_SECONDS: Final = 15.0
"""How old the last look at the cluster may become."""
_FORBIDDEN: Final = 403

T = TypeVar("T")


class _Look(Generic[T]):
    """What was read last, by whichever service's pass."""

    def __init__(self, read: Callable[[], Awaitable[T]], clock: Callable[[], float]) -> None:
        self._read = read
        self._clock = clock
        self._at = float("-inf")
        self._found: T

    async def take(self, *, fresh: bool) -> T:
        now = self._clock()
        if fresh or now - self._at >= FABRIC_SECONDS:
            self._found = await self._read()
            self._at = now
        return self._found


class FabricObserver:
    """Remembers the last look, for all services: the lists are long where the cluster is large."""

    def __init__(self, cluster: Cluster, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._nodes = _Look(self._read_nodes, clock)
        self._claimable = _Look(self._read_claimable, clock)

    async def nodes(self, *, fresh: bool) -> tuple[NodeView, ...] | None:
        """The nodes; None when the operator may not read them. `fresh`: as they are now."""
        return await self._nodes.take(fresh=fresh)

    async def claimable(self, *, fresh: bool) -> Claimable | None:
        """What a claim can name; None when the operator may not read it."""
        return await self._claimable.take(fresh=fresh)

    async def _read_nodes(self) -> tuple[NodeView, ...] | None:
        try:
            nodes = await self._cluster.list("Node")
        except ClusterError as error:
            if error.status != _FORBIDDEN:
                raise
            return None
        return tuple(read_node(node) for node in nodes)

    async def _read_claimable(self) -> Claimable | None:
        try:
            slices = await self._cluster.list("ResourceSlice")
            classes = await self._cluster.list("DeviceClass")
        except MissingError:
            return Claimable()  # a cluster from before dynamic resource allocation
        except ClusterError as error:
            if error.status != _FORBIDDEN:
                raise
            return None
        return Claimable(
            tuple(device for one in slices for device in read_devices(one)),
            frozenset(one["metadata"]["name"] for one in classes),
        )
