"""Where files lie: in the per-user cache, and in the folder of one cluster."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# sun_path holds 108 bytes, including the closing NUL.
MAX_SOCKET_PATH = 107


def cache_dir() -> Path:
    """The per-user cache: ``$TANDEM_CACHE_DIR``, or else ``~/.cache/tandem``."""
    named = os.environ.get("TANDEM_CACHE_DIR")
    if named:
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tandem"


def clusters_dir() -> Path:
    """The parent of every cluster's folder: ``$TANDEM_STATE_DIR``, or else in the cache."""
    named = os.environ.get("TANDEM_STATE_DIR")
    return Path(named).absolute() if named else cache_dir() / "clusters"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` across processes; the file is created if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@dataclass(frozen=True)
class NodeFolder:
    """The files of one node."""

    root: Path

    @property
    def socket(self) -> Path:
        """The CRI socket between kubelet and procri."""
        return self.root / "cri.sock"

    @property
    def procri(self) -> Path:
        """procri's own folder, which includes its container records."""
        return self.root / "procri"

    @property
    def kubelet(self) -> Path:
        """The kubelet's root directory."""
        return self.root / "kubelet"

    @property
    def cdi(self) -> Path:
        """The CDI specifications of devices that DRA drivers hand out."""
        return self.root / "cdi"

    @property
    def config(self) -> Path:
        """The configuration files of kubelet and kube-proxy."""
        return self.root / "config"


@dataclass(frozen=True)
class ClusterFolder:
    """The files of one cluster, which has none anywhere else."""

    root: Path

    @classmethod
    def of(cls, name: str) -> ClusterFolder:
        """The folder of the cluster `name`, whether it exists or not."""
        return cls(clusters_dir() / name)

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self.root.name

    @property
    def spec(self) -> Path:
        """The ClusterSpec it was started with."""
        return self.root / "spec.json"

    @property
    def plan(self) -> Path:
        """Its address plan."""
        return self.root / "addresses.json"

    @property
    def state(self) -> Path:
        """The state that the supervisor last wrote."""
        return self.root / "state.json"

    @property
    def binaries(self) -> Path:
        """The paths of the binaries that it runs on."""
        return self.root / "binaries.json"

    @property
    def images(self) -> Path:
        """The image table that every node's procri reads."""
        return self.root / "images.json"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.root / "kubeconfig"

    @property
    def pki(self) -> Path:
        """Certificates and keys."""
        return self.root / "pki"

    @property
    def config(self) -> Path:
        """The configuration files of the control plane."""
        return self.root / "config"

    @property
    def etcd(self) -> Path:
        """etcd's data."""
        return self.root / "etcd"

    @property
    def logs(self) -> Path:
        """One log per component."""
        return self.root / "logs"

    @property
    def lock(self) -> Path:
        """Held while the cluster is started or removed; outlives the folder itself."""
        # In the cache even if TANDEM_STATE_DIR is elsewhere: nothing is left behind there.
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]
        return cache_dir() / "locks" / f"{self.name}-{digest}"

    def node(self, index: int) -> NodeFolder:
        """The folder of the node with this index."""
        # Short, because the path of the CRI socket contains it.
        return NodeFolder(self.root / f"n{index}")
