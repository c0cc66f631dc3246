"""One machine, no GPU: the embedded cluster and what runs on it.

`LocalCluster.up` starts a real Kubernetes cluster on this machine. Its steps are the folders: it
checks the machine (`machine`), builds the binaries (`binaries`), writes what the components need
(`components`), and leaves a supervisor behind (`supervision`), which makes the nodes (`nodes`) and
keeps everything running. `ExternalCluster` offers the same commands for a cluster that a kubeconfig
names.
"""

from tandem_local.binaries.build import find_binaries
from tandem_local.client import Cluster, ExternalCluster
from tandem_local.cluster import ClusterAddresses, LocalCluster
from tandem_local.components.images import default_images
from tandem_local.errors import (
    BuildError,
    ClusterNotFound,
    CommandError,
    LocalError,
    RequirementError,
    RootRequired,
    SpecError,
    StartError,
)
from tandem_local.progress import Progress, ProgressEvent, shown_progress
from tandem_local.spec import ClusterSpec, ImageEntry, NodeSpec
from tandem_local.supervision.state import ClusterStatus, ComponentStatus, NodeStatus

__all__ = [
    "BuildError",
    "Cluster",
    "ClusterAddresses",
    "ClusterNotFound",
    "ClusterSpec",
    "ClusterStatus",
    "CommandError",
    "ComponentStatus",
    "ExternalCluster",
    "ImageEntry",
    "LocalCluster",
    "LocalError",
    "NodeSpec",
    "NodeStatus",
    "Progress",
    "ProgressEvent",
    "RequirementError",
    "RootRequired",
    "SpecError",
    "StartError",
    "default_images",
    "find_binaries",
    "shown_progress",
]
