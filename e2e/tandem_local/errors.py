"""What can go wrong with the embedded cluster.

LocalError
├── RequirementError   the machine lacks something; the message names the remedy
│   └── RootRequired
├── BuildError         the cluster's binaries could not be built
├── SpecError          the wanted cluster is not one that can be (also a ValueError)
├── ClusterNotFound    no cluster of that name runs
├── StartError         it did not come up in time; holds the log of the culprit
└── CommandError       kubectl or helm ended with a status other than 0
"""

from __future__ import annotations

from collections.abc import Sequence


class LocalError(Exception):
    """Base of everything that this package raises on purpose."""


class RequirementError(LocalError):
    """The machine lacks a tool, a right or a file."""


class RootRequired(RequirementError):
    """The embedded cluster makes namespaces, which takes root."""

    def __init__(self) -> None:
        super().__init__(
            "the embedded cluster needs root, since every node is a network namespace.\n"
            "Run the same command with sudo, or take one of the two other ways:\n"
            "  an existing cluster   --kubeconfig FILE (or TANDEM_KUBECONFIG=FILE)\n"
            "  no Kubernetes at all  tandem serve MODEL"
        )


class BuildError(LocalError):
    """The Go toolchain is missing or the build failed."""


class SpecError(LocalError, ValueError):
    """A cluster specification that cannot be met."""


class ClusterNotFound(LocalError):
    """There is no running cluster of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"no cluster named {name!r} is running; start one with `tandem cluster up`"
        )
        self.name = name


class StartError(LocalError):
    """The cluster did not become Ready."""


class CommandError(LocalError):
    """A kubectl or helm command failed."""

    def __init__(self, argv: Sequence[str], returncode: int, stdout: str, stderr: str) -> None:
        command = " ".join(argv)
        detail = (stderr or stdout).strip()
        super().__init__(f"`{command}` ended with status {returncode}: {detail}")
        self.argv = list(argv)
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr
