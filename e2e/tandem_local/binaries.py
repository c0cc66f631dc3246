"""The two binaries that a cluster runs on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Binaries:
    """Paths of the multi-call binary and of CoreDNS."""

    cluster: Path
    """etcd, the Kubernetes components, kubectl, helm and procri."""
    coredns: Path
    """CoreDNS."""

    def to_json(self) -> str:
        """Serialise."""
        return json.dumps({"cluster": str(self.cluster), "coredns": str(self.coredns)})

    @classmethod
    def from_json(cls, text: str) -> Binaries:
        """The inverse of `to_json`."""
        data = json.loads(text)
        return cls(Path(data["cluster"]), Path(data["coredns"]))
