"""Leader election on a Lease, with the rules of Kubernetes' own clients.

A standby takes the lease when the holder hasn't renewed it for `duration` seconds *as seen by the
standby's own clock*, so clock skew between nodes does no harm. A leader that can't renew (the API
server is down) stops working after `renew_deadline` seconds, and continues when it renews before
another replica takes the lease. When another one did, the process must end (`LeadershipLost`).
"""

import asyncio
import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from tandem_operator.clients.cluster import Cluster, JsonObject
from tandem_operator.errors import ClusterError, LeadershipLost, MissingError

log = structlog.get_logger("tandem.leader")


@dataclass(frozen=True)
class LeaseTimes:
    """Seconds. A dead leader is replaced after at most `duration` + 2 × `retry`."""

    duration: float = 10.0
    renew_deadline: float = 7.0
    retry: float = 2.0


@dataclass
class _Seen:
    """The lease's record as last seen, and when it last changed on our clock."""

    record: tuple[str, str, int] = ("", "", 0)
    at: float = 0.0


class Leader:
    """Holds or awaits one Lease; calls `on_change` with whether this replica may work now."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        name: str,
        identity: str,
        on_change: Callable[[bool], None],
        times: LeaseTimes | None = None,
    ) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._on_change = on_change
        self._times = times or LeaseTimes()
        self._seen = _Seen()
        self._held = False
        self._renewed = 0.0
        self.leading = False

    async def acquire(self) -> None:
        """Return when this replica leads."""
        while not self._held:
            try:
                await self._try()
            except ClusterError as error:
                log.warning("can't read or write the lease", error=str(error))
            if not self._held:
                await asyncio.sleep(self._times.retry)
        log.info("leading", identity=self._identity)

    async def keep(self) -> None:
        """Renew the lease without end. Raises LeadershipLost when another replica took it."""
        while True:
            await asyncio.sleep(self._times.retry)
            try:
                await asyncio.wait_for(self._try(), self._times.renew_deadline)
            except (ClusterError, TimeoutError) as error:
                log.warning("can't renew the lease", error=str(error))
            if not self._held:
                raise LeadershipLost(f"the lease {self._name} is held by {self._seen.record[0]}")
            if time.monotonic() - self._renewed > self._times.renew_deadline:
                self._set(leading=False)

    async def release(self) -> None:
        """Give the lease back, so that a standby takes over without waiting."""
        if not self._held:
            return
        self._set(leading=False)
        self._held = False
        try:
            lease = await self._cluster.get("Lease", self._name, self._namespace)
            if lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"]["holderIdentity"] = ""
                await self._cluster.replace(lease)
        except ClusterError as error:
            log.warning("the lease was not released", error=str(error))

    async def _try(self) -> None:
        try:
            lease = await self._cluster.get("Lease", self._name, self._namespace)
        except MissingError:
            await self._cluster.create(self._body({}))
            self._won()
            return
        spec = lease.get("spec", {})
        holder = spec.get("holderIdentity") or ""
        record = (holder, str(spec.get("renewTime")), int(spec.get("leaseTransitions") or 0))
        if record != self._seen.record:
            self._seen = _Seen(record, time.monotonic())
        duration = float(spec.get("leaseDurationSeconds") or self._times.duration)
        if holder not in ("", self._identity):
            if self._held:
                self._held = False
                self._set(leading=False)
                return
            if time.monotonic() - self._seen.at < duration:
                return
        started = time.monotonic()
        await self._cluster.replace(self._body(lease))
        self._won(started)

    def _won(self, at: float | None = None) -> None:
        self._held = True
        self._renewed = time.monotonic() if at is None else at
        self._set(leading=True)

    def _set(self, *, leading: bool) -> None:
        if leading != self.leading:
            self.leading = leading
            self._on_change(leading)

    def _body(self, lease: JsonObject) -> JsonObject:
        spec = lease.get("spec", {})
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        now = now.replace("+00:00", "Z")
        taken = spec.get("holderIdentity") != self._identity
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": lease.get("metadata") or {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": max(1, round(self._times.duration)),
                "acquireTime": now if taken else spec.get("acquireTime", now),
                "renewTime": now,
                "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (1 if taken else 0),
            },
        }
