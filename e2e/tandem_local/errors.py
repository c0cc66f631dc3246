"""What can go wrong with the embedded cluster.

LocalError
├── RequirementError   the machine lacks something that the message names, with the remedy
│   └── RootRequired
├── BuildError         the cluster's binaries could not be built
├── SpecError          a cluster cannot be as specified (also a ValueError)
├── ClusterNotFound    no cluster of that name is running
├── StartError         the cluster did not become Ready; holds the end of the relevant logs
└── CommandError       kubectl or helm exited with a status other than 0
"""

from __future__ import annotations

from collections.abc import Sequence


class LocalError(Exception):
    """The base of every error that this package raises on purpose."""


class RequirementError(LocalError):
    """The machine lacks a tool, a right or a file."""


class RootRequired(RequirementError):
    """The embedded cluster creates namespaces, for which it needs root."""

    def __init__(self) -> None:
        super().__init__(
            "the embedded cluster needs root, because every node is a network namespace.\n"
            "Run the same command with sudo, or do without the embedded cluster:\n"
            "  use an existing cluster   --kubeconfig FILE (or TANDEM_KUBECONFIG=FILE)\n"
            "  use no Kubernetes at all  tandem serve MODEL"
        )


class BuildError(LocalError):
    """The Go toolchain is missing, or the build failed."""


class SpecError(LocalError, ValueError):
    """A cluster cannot be as specified."""


class ClusterNotFound(LocalError):
    """No cluster of that name is running."""

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
        super().__init__(f"`{command}` exited with status {returncode}: {detail}")
        self.argv = list(argv)
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr
