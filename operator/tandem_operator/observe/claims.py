"""Whose a service is: the operator that its status names serves it for as long as that lives.

An operator lives while its Lease changes, as seen by our own clock. Who may not read that Lease
can't know: one that watches all namespaces then leaves the service alone, one that was given
namespaces takes it, and takes it only once. So no two of them take a service from each other.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from tandem_operator.clients.cluster import Cluster
from tandem_operator.errors import ClusterError, MissingError
from tandem_operator.facts.observed import Claim, Ownership
from tandem_operator.names.objects import INFERENCE_SERVICES

STALE_SECONDS: Final = 30.0
"""An operator whose Lease didn't change for this time is gone. It stops work after 7 seconds."""
LOOK_SECONDS: Final = 5.0
"""A Lease is read no more often than this, however many services name it."""
FORBIDDEN: Final = 403

log = structlog.get_logger("tandem.claims")


@dataclass
class _Seen:
    """A Lease as it was last read. `record` changes with every renewal."""

    looked: float = float("-inf")
    record: tuple[str, str] | None = None
    changed: float = float("-inf")
    problem: str = ""  # why there is none to read


class ClaimReader:
    """Judges claims. `everywhere`: this operator watches all namespaces."""

    def __init__(
        self,
        cluster: Cluster,
        me: str,
        *,
        everywhere: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._me = me
        self._everywhere = everywhere
        self._clock = clock
        self._leases: dict[str, _Seen] = {}
        self._held: set[str] = set()  # uids of services that were this operator's
        self._told: dict[str, str] = {}  # whose a service is, by its uid

    async def read(self, uid: str, holder: str) -> Ownership:
        """Whose the service with this uid is, whose status names `holder`.

        Raises ClusterError when the API server can't be asked.
        """
        if holder == self._me:
            self._held.add(uid)
            self._told.pop(uid, None)
            return Ownership(Claim.MINE, self._me, holder)
        if not holder:
            return Ownership(Claim.FREE, self._me)
        seen = await self._look(holder)
        alive = self._clock() - seen.changed < STALE_SECONDS
        why = seen.problem or f"its Lease was renewed in the last {STALE_SECONDS:.0f} s"
        if seen.problem:
            alive = seen.problem != _GONE and (self._everywhere or uid in self._held)
        if not alive:
            return Ownership(Claim.FREE, self._me, holder, why)
        told = self._told.get(uid) == holder
        self._told[uid] = holder
        if not told:
            log.warning("served by another operator", service=uid, operator=holder, why=why)
        return Ownership(Claim.OTHERS, self._me, holder, why, told)

    def forget(self, uid: str) -> None:
        """Forget a service that is gone."""
        self._held.discard(uid)
        self._told.pop(uid, None)

    async def _look(self, holder: str) -> _Seen:
        seen = self._leases.setdefault(holder, _Seen())
        now = self._clock()
        if now - seen.looked < LOOK_SECONDS:
            return seen
        namespace, _, name = holder.partition("/")
        try:
            spec = (await self._cluster.get("Lease", name, namespace)).get("spec") or {}
        except MissingError:
            seen.looked, seen.problem = now, _GONE
            return seen
        except ClusterError as error:
            if error.status != FORBIDDEN:
                raise
            seen.looked, seen.problem = now, _remedy(namespace, name)
            return seen
        record = (str(spec.get("holderIdentity")), str(spec.get("renewTime")))
        if record != seen.record:
            seen.record, seen.changed = record, now
        seen.looked, seen.problem = now, ""
        return seen


_GONE: Final = "its Lease doesn't exist"


def _remedy(namespace: str, name: str) -> str:
    return (
        f"its Lease {name} in {namespace} can't be read; if that operator is gone, run kubectl "
        f"patch {INFERENCE_SERVICES} NAME --subresource=status --type=merge "
        """-p '{"status": {"operator": null}}'"""
    )
