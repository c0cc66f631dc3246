"""What a running cluster looks like, for people and for tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tandem_local.state import Phase


@dataclass(frozen=True)
class NodeStatus:
    """One node."""

    name: str
    address: str
    pod_subnet: str
    resources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ComponentStatus:
    """One process of the cluster."""

    name: str
    node: str
    pid: int | None
    """None while it waits to be started again."""
    restarts: int
    rss_bytes: int
    log: Path


@dataclass(frozen=True)
class ClusterStatus:
    """One cluster."""

    name: str
    phase: Phase
    message: str
    supervisor_pid: int
    api_url: str
    kubeconfig: Path
    nodes: tuple[NodeStatus, ...]
    components: tuple[ComponentStatus, ...]

    @property
    def rss_bytes(self) -> int:
        """Resident memory of all components."""
        return sum(component.rss_bytes for component in self.components)
