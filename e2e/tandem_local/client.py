"""kubectl and helm for one cluster, whether it is the embedded one or an existing one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tandem_local.binaries.build import find_binaries
from tandem_local.errors import CommandError, RequirementError
from tandem_local.folders import cache_dir
from tandem_local.progress import Progress, silent

KUBECONFIG = "TANDEM_KUBECONFIG"


class Cluster(Protocol):
    """What every cluster offers: the embedded one, and one that a kubeconfig names."""

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig with an administrator's rights."""

    def kubectl(
        self,
        *args: str,
        input: str | None = None,  # noqa: A002 (subprocess.run's own name)
        check: bool = True,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl. Raises CommandError if it fails and `check` is set."""

    def helm(
        self,
        *args: str,
        input: str | None = None,  # noqa: A002 (subprocess.run's own name)
        check: bool = True,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run helm. Raises CommandError if it fails and `check` is set."""

    def kubectl_argv(self, *args: str) -> list[str]:
        """kubectl's command line, for a caller that runs it by itself (streams, terminals)."""

    def helm_argv(self, *args: str) -> list[str]:
        """helm's command line, for a caller that runs it by itself (streams, terminals)."""

    def environment(self) -> dict[str, str]:
        """The environment in which to run `kubectl_argv` and `helm_argv`."""


class Commands:
    """Runs kubectl and helm with a kubeconfig; both keep their caches in Tandem's."""

    def __init__(self, kubeconfig: Path, kubectl: Sequence[str], helm: Sequence[str]) -> None:
        self._kubeconfig = kubeconfig
        self._kubectl = list(kubectl)
        self._helm = list(helm)

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig with an administrator's rights."""
        return self._kubeconfig

    def kubectl_argv(self, *args: str) -> list[str]:
        """kubectl's command line, for a caller that runs it by itself (streams, terminals)."""
        return [*self._kubectl, *args]

    def helm_argv(self, *args: str) -> list[str]:
        """helm's command line, for a caller that runs it by itself (streams, terminals)."""
        return [*self._helm, *args]

    def environment(self) -> dict[str, str]:
        """The environment in which to run `kubectl_argv` and `helm_argv`."""
        helm = cache_dir() / "helm"
        return os.environ | {
            "KUBECONFIG": str(self._kubeconfig),
            "KUBECACHEDIR": str(cache_dir() / "kube"),
            "HELM_CACHE_HOME": str(helm / "cache"),
            "HELM_CONFIG_HOME": str(helm / "config"),
            "HELM_DATA_HOME": str(helm / "data"),
        }

    def kubectl(
        self,
        *args: str,
        input: str | None = None,  # noqa: A002 (subprocess.run's own name)
        check: bool = True,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl. Raises CommandError if it fails and `check` is set."""
        return self._run(self.kubectl_argv(*args), "kubectl", args, input, check, timeout)

    def helm(
        self,
        *args: str,
        input: str | None = None,  # noqa: A002 (subprocess.run's own name)
        check: bool = True,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run helm. Raises CommandError if it fails and `check` is set."""
        return self._run(self.helm_argv(*args), "helm", args, input, check, timeout)

    def _run(
        self,
        argv: list[str],
        name: str,
        args: Sequence[str],
        text: str | None,
        check: bool,
        timeout: float,
    ) -> subprocess.CompletedProcess[str]:
        # A command that is given no input must not wait for the terminal.
        done = subprocess.run(
            argv,
            input=text or "",
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=self.environment(),
        )
        if check and done.returncode != 0:
            raise CommandError([name, *args], done.returncode, done.stdout, done.stderr)
        return done


class ExternalCluster(Commands):
    """A cluster that exists already: kind, k3s, a real one.

    kubectl and helm come from PATH, or else from the embedded cluster's binary.
    """

    def __init__(self, kubeconfig: Path, progress: Progress = silent) -> None:
        kubeconfig = kubeconfig.expanduser().absolute()
        if not kubeconfig.is_file():
            raise RequirementError(
                f"no kubeconfig at {kubeconfig}: correct --kubeconfig or {KUBECONFIG}"
            )
        kubectl, helm = shutil.which("kubectl"), shutil.which("helm")
        multi = None if kubectl and helm else str(find_binaries(progress).cluster)
        super().__init__(
            kubeconfig,
            [kubectl] if kubectl else [str(multi), "kubectl"],
            [helm] if helm else [str(multi), "helm"],
        )

    @classmethod
    def from_environment(cls, progress: Progress = silent) -> ExternalCluster | None:
        """The cluster that ``TANDEM_KUBECONFIG`` names; None if it is not set."""
        named = os.environ.get(KUBECONFIG)
        return cls(Path(named), progress) if named else None
