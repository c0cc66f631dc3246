"""A cluster that exists already: kind, k3s, a real one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tandem_local.build import find_binaries
from tandem_local.client import Commands
from tandem_local.errors import RequirementError
from tandem_local.progress import Progress, silent

KUBECONFIG = "TANDEM_KUBECONFIG"


class ExternalCluster(Commands):
    """The surface of LocalCluster that makes sense for a cluster which is not ours.

    kubectl and helm come from PATH, else from the embedded cluster's binary.
    """

    def __init__(self, kubeconfig: Path, progress: Progress = silent) -> None:
        kubeconfig = kubeconfig.expanduser().absolute()
        if not kubeconfig.is_file():
            raise RequirementError(f"no kubeconfig at {kubeconfig}")
        kubectl, helm = shutil.which("kubectl"), shutil.which("helm")
        multi = None if kubectl and helm else str(find_binaries(progress).cluster)
        super().__init__(
            kubeconfig,
            [kubectl] if kubectl else [str(multi), "kubectl"],
            [helm] if helm else [str(multi), "helm"],
        )

    @classmethod
    def from_environment(cls, progress: Progress = silent) -> ExternalCluster | None:
        """The cluster that ``TANDEM_KUBECONFIG`` names; None where it is not set."""
        named = os.environ.get(KUBECONFIG)
        return cls(Path(named), progress) if named else None
