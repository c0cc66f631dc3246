"""The state of a cluster: the supervisor's record in a file, and a view of it for people."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from tandem_local.machine.process import ProcessRef, boot_id


class Phase(StrEnum):
    """The phase that a cluster is in."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    STOPPING = "stopping"


@dataclass
class ComponentState:
    """One component, as the supervisor sees it."""

    name: str
    node: str
    process: ProcessRef | None = None
    restarts: int = 0
    exit_code: int | None = None


@dataclass
class ClusterState:
    """The supervisor's record, which is written in full at every change."""

    supervisor: ProcessRef
    phase: Phase = Phase.STARTING
    message: str = ""
    holders: dict[str, ProcessRef] = field(default_factory=dict)
    components: list[ComponentState] = field(default_factory=list)

    def processes(self) -> list[ProcessRef]:
        """Every recorded process except the supervisor itself."""
        running = [c.process for c in self.components if c.process is not None]
        return running + list(self.holders.values())

    def find(self, name: str, node: str | None = None) -> ComponentState | None:
        """The component with this name, on this node if one is given; None if there is none."""
        for component in self.components:
            if component.name == name and node in (None, component.node):
                return component
        return None

    def write(self, path: Path) -> None:
        """Write the file in one step, so that no reader sees half of it."""
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(self._to_data(), indent=1))
        os.replace(fresh, path)

    @classmethod
    def read(cls, path: Path) -> ClusterState | None:
        """The last state written; None if there is none from this boot."""
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        if data.get("boot", boot_id()) != boot_id():
            return None
        return cls(
            supervisor=ProcessRef.from_data(data["supervisor"]),
            phase=Phase(data["phase"]),
            message=data["message"],
            holders={n: ProcessRef.from_data(ref) for n, ref in data["holders"].items()},
            components=[
                ComponentState(
                    name=c["name"],
                    node=c["node"],
                    process=ProcessRef.from_data(c["process"]) if c["process"] else None,
                    restarts=c["restarts"],
                    exit_code=c["exitCode"],
                )
                for c in data["components"]
            ],
        )

    def _to_data(self) -> dict[str, Any]:
        return {
            "boot": boot_id(),
            "supervisor": self.supervisor.to_data(),
            "phase": str(self.phase),
            "message": self.message,
            "holders": {node: ref.to_data() for node, ref in self.holders.items()},
            "components": [
                {
                    "name": c.name,
                    "node": c.node,
                    "process": c.process.to_data() if c.process else None,
                    "restarts": c.restarts,
                    "exitCode": c.exit_code,
                }
                for c in self.components
            ],
        }


@dataclass(frozen=True)
class NodeStatus:
    """One node, for people and tests to read."""

    name: str
    address: str
    pod_subnet: str
    resources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ComponentStatus:
    """One process of the cluster, for people and tests to read."""

    name: str
    node: str
    pid: int | None
    """None while it waits for its restart."""
    restarts: int
    rss_bytes: int
    log: Path


@dataclass(frozen=True)
class ClusterStatus:
    """One cluster, for people and tests to read."""

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
        """The resident memory of all components together."""
        return sum(component.rss_bytes for component in self.components)
