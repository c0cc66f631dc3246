"""Events for `kubectl describe` and `kubectl get events`."""

import time
from datetime import UTC, datetime
from typing import Final

import structlog

from tandem_operator.clients.cluster import Cluster
from tandem_operator.errors import ClusterError
from tandem_operator.facts.observed import Observed
from tandem_operator.names.objects import (
    API_VERSION,
    INFERENCE_SERVICE,
    REPORTING_CONTROLLER,
    stable_id,
)
from tandem_operator.plan import Note

REPEAT_SECONDS: Final = 60.0

log = structlog.get_logger("tandem.events")


class Events:
    """Posts events, the same one at most once a minute. A lost event is not an error."""

    def __init__(self, cluster: Cluster, instance: str) -> None:
        self._cluster = cluster
        self._instance = instance
        self._posted: dict[tuple[str, str, str], float] = {}

    async def post(self, note: Note, observed: Observed) -> None:
        """Post a note about a service."""
        now = time.monotonic()
        key = (observed.uid, note.reason, note.message)
        self._posted = {k: at for k, at in self._posted.items() if now - at < REPEAT_SECONDS}
        if key in self._posted:
            return
        self._posted[key] = now
        at = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "name": f"{observed.name}.{stable_id(*key, at)}",
                "namespace": observed.namespace,
            },
            "eventTime": at,
            "type": "Warning" if note.warning else "Normal",
            "reason": note.reason[:128],
            "note": note.message[:1024],
            "action": "Reconcile",
            "reportingController": REPORTING_CONTROLLER,
            "reportingInstance": self._instance[:128],
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": INFERENCE_SERVICE,
                "name": observed.name,
                "namespace": observed.namespace,
                "uid": observed.uid,
            },
        }
        try:
            await self._cluster.create(body)
        except ClusterError as error:
            log.info("event was not posted", reason=note.reason, error=str(error))
