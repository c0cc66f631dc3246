"""`tandem uninstall`: takes Tandem out of a cluster, whatever its releases are called."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tandem_cli.console import console
from tandem_cli.errors import CliError
from tandem_cli.target import find_target
from tandem_operator.crds.kinds import KINDS
from tandem_operator.names.objects import INFERENCE_SERVICES

if TYPE_CHECKING:
    from tandem_local import Cluster

CRDS: Final = tuple(kind.crd_name for kind in KINDS)
SELECTOR: Final = "app.kubernetes.io/part-of=tandem,app.kubernetes.io/component=operator"
RELEASE_NAME: Final = "meta.helm.sh/release-name"
RELEASE_NAMESPACE: Final = "meta.helm.sh/release-namespace"


@dataclass(frozen=True, order=True)
class Release:
    """A release of the chart."""

    namespace: str
    name: str


def uninstall(cluster: str, kubeconfig: Path | None, keep_services: bool, timeout: int) -> None:
    """Remove services, operators and CRDs; with `keep_services` only the operators.

    Raises CliError when the services don't end within `timeout` seconds.
    """
    target = find_target(cluster, kubeconfig)
    if not keep_services:
        delete_services(target, timeout)
    releases = find_releases(target)
    for release in releases:
        target.helm("uninstall", release.name, "-n", release.namespace, "--ignore-not-found")
        console.print(f"operator {release.name} in {release.namespace} is removed")
    if not releases:
        console.print("no operator is installed")
    if keep_services:
        console.print("the services and the CRDs stay; the next operator continues with them")
        return
    target.kubectl(
        *("delete", "crd", *CRDS, "--ignore-not-found", f"--timeout={timeout}s"),
        timeout=timeout + 30,
    )
    console.print("the services and the CRDs are removed")


def delete_services(target: "Cluster", timeout: int) -> None:
    """Delete every service, and wait until everything that it was made of is gone."""
    crd = f"{INFERENCE_SERVICES}.tandem.dev"
    if not target.kubectl("get", "crd", crd, "--ignore-not-found", "-o", "name").stdout:
        return
    done = target.kubectl(
        *("delete", INFERENCE_SERVICES, "--all", "-A", "--cascade=foreground"),
        f"--timeout={timeout}s",
        timeout=timeout + 30,
        check=False,
    )
    if done.returncode != 0:
        raise CliError(
            f"not every service has ended after {timeout} s: {done.stderr.strip()}",
            "workers finish their streams for up to rollout.drainSeconds: run this again, or "
            "delete the pods with --grace-period=0 --force",
        )


def find_releases(target: "Cluster") -> list[Release]:
    """The releases in a cluster, by what helm writes on their Deployments."""
    text = target.kubectl("get", "deployments", "-A", "-l", SELECTOR, "-o", "json").stdout
    return read_releases(json.loads(text)["items"])


def read_releases(deployments: list[dict[str, Any]]) -> list[Release]:
    """The releases of which these are the operators."""
    notes = (item["metadata"].get("annotations") or {} for item in deployments)
    found = {
        Release(note[RELEASE_NAMESPACE], note[RELEASE_NAME])
        for note in notes
        if note.get(RELEASE_NAME) and note.get(RELEASE_NAMESPACE)
    }
    return sorted(found)
