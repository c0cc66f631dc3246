"""Whether the operators that serve services are alive: the Lease that each of them renews says so.

A status that nobody keeps stays as it was, so without this a service would look Ready for ever.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tandem_local import Cluster

STALE_SECONDS: Final = 60.0
"""An operator renews its Lease every two seconds; this leaves room for clocks that differ."""


@dataclass(frozen=True)
class Heartbeat:
    """When an operator was last alive, as its Lease tells."""

    operator: str  # the namespace and name of its Lease
    seen: datetime | None = None
    problem: str = ""  # why `seen` is not known

    def silent(self, now: datetime) -> str:
        """Why what this operator wrote may be out of date; empty while the operator is alive."""
        if not self.operator:
            return "no operator serves it: install one, or see the log of the one that should"
        if self.seen is None:
            return f"operator {self.operator} is not there ({self.problem}): install it again"
        age = (now - self.seen).total_seconds()
        if age < STALE_SECONDS:
            return ""
        return (
            f"operator {self.operator} was last alive {_duration(age)} ago: start it, or install "
            "another; until then nothing is kept up to date"
        )

    def summary(self, now: datetime) -> dict[str, Any]:
        """What `tandem status -o json` shows of it."""
        seen = self.seen.isoformat() if self.seen else ""
        return {"name": self.operator, "lastAlive": seen, "problem": self.silent(now)}


def read_heartbeats(target: "Cluster", operators: Iterable[str]) -> dict[str, Heartbeat]:
    """The heartbeats of operators, by name; an empty name is a service that none serves."""
    return {name: _read(target, name) if name else Heartbeat("") for name in set(operators)}


def read_lease(operator: str, lease: dict[str, Any]) -> Heartbeat:
    """The heartbeat in a Lease."""
    renewed = lease.get("spec", {}).get("renewTime")
    if not renewed:
        return Heartbeat(operator, problem="its Lease was never renewed")
    return Heartbeat(operator, datetime.fromisoformat(renewed).astimezone(UTC))


def _read(target: "Cluster", operator: str) -> Heartbeat:
    namespace, _, name = operator.partition("/")
    done = target.kubectl("get", "lease", name, "-n", namespace, "-o", "json", check=False)
    if done.returncode != 0:
        return Heartbeat(operator, problem=done.stderr.strip() or "its Lease can't be read")
    return read_lease(operator, json.loads(done.stdout))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
