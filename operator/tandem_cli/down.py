"""`tandem down`: the end of an embedded cluster, or of what `up` installed into another."""

from pathlib import Path

from tandem_cli.console import console
from tandem_cli.target import find_target
from tandem_cli.up import OPERATOR_NAMESPACE, RELEASE


def take_down(cluster: str, kubeconfig: Path | None) -> None:
    """Remove everything that `up` started; an embedded cluster goes as a whole."""
    from tandem_local import LocalCluster

    if kubeconfig is None:
        if LocalCluster.remove(cluster):
            console.print(f"cluster {cluster!r} is gone; the build and model caches stay")
        else:
            console.print(f"there is no cluster named {cluster!r}; nothing to do")
        return
    target = find_target(cluster, kubeconfig)
    target.kubectl("delete", "tisvc", "--all", "-A", "--timeout=120s", timeout=150)
    target.helm("uninstall", RELEASE, "-n", OPERATOR_NAMESPACE, "--ignore-not-found")
    target.kubectl("delete", "namespace", OPERATOR_NAMESPACE, "--ignore-not-found", timeout=120)
    console.print("services and operator removed; the CRDs stay")
