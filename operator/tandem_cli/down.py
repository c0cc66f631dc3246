"""`tandem down`: removes an embedded cluster, or what `up` installed into another one."""

from pathlib import Path

from tandem_cli.console import console
from tandem_cli.target import find_target
from tandem_cli.uninstall import delete_services
from tandem_cli.up import OPERATOR_NAMESPACE, RELEASE

SERVICES_TIMEOUT_S = 120


def take_down(cluster: str, kubeconfig: Path | None) -> None:
    """Remove everything that `up` started; an embedded cluster is removed as a whole."""
    from tandem_local import LocalCluster

    if kubeconfig is None:
        if LocalCluster.remove(cluster):
            console.print(f"cluster {cluster!r} is removed; the build and model caches are kept")
        else:
            console.print(f"there is no cluster named {cluster!r}, so nothing is removed")
        return
    target = find_target(cluster, kubeconfig)
    delete_services(target, SERVICES_TIMEOUT_S)
    target.helm("uninstall", RELEASE, "-n", OPERATOR_NAMESPACE, "--ignore-not-found")
    target.kubectl("delete", "namespace", OPERATOR_NAMESPACE, "--ignore-not-found", timeout=120)
    console.print("the services and the operator are removed; the CRDs are kept")
