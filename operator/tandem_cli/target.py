"""Which cluster a command speaks to: an existing one that a kubeconfig names, or the embedded."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem_cli.errors import CliError, NotRunning

if TYPE_CHECKING:
    from tandem_local import ExternalCluster, LocalCluster

    Target = LocalCluster | ExternalCluster


def find_target(cluster: str, kubeconfig: Path | None) -> "Target":
    """The running cluster. NotRunning when there is none, CliError when the file is missing."""
    from tandem_local import ExternalCluster, LocalCluster

    if kubeconfig is not None:
        if not kubeconfig.is_file():
            raise CliError(
                f"kubeconfig {kubeconfig} does not exist",
                "give the path of a file, or unset TANDEM_KUBECONFIG to use the embedded cluster",
            )
        return ExternalCluster(kubeconfig)
    found = LocalCluster.find(cluster)
    if found is None:
        raise NotRunning(
            f"no embedded cluster named {cluster!r} is running",
            "start it with `tandem up` (or `tandem cluster up`), or name an existing cluster with "
            "--kubeconfig",
        )
    return found


def passthrough(tool: str, arguments: list[str]) -> int:
    """Run kubectl or helm with the cluster's kubeconfig, in place of this process."""
    name = os.environ.get("TANDEM_CLUSTER", "tandem")
    configured = os.environ.get("TANDEM_KUBECONFIG")
    target = find_target(name, Path(configured) if configured else None)
    command = target.tool(tool)
    environment = {**os.environ, "KUBECONFIG": str(target.kubeconfig)}
    sys.stdout.flush()
    os.execve(command[0], [*command, *arguments], environment)


def get_items(target: "Target", kind: str, *arguments: str) -> list[dict[str, Any]]:
    """Objects of a kind, as kubectl prints them in JSON."""
    import json

    text = target.kubectl("get", kind, "-o", "json", *arguments).stdout
    items: list[dict[str, Any]] = json.loads(text)["items"]
    return items


def repository_file(relative: str, option: str) -> Path:
    """A file of the source tree. CliError when this is an installed wheel without it."""
    for parent in Path(__file__).resolve().parents:
        if (parent / relative).exists() and (parent / "pyproject.toml").is_file():
            return parent / relative
    raise CliError(
        f"{relative} is not beside this installation",
        f"run from a checkout of Tandem, or give its path with {option}",
    )
