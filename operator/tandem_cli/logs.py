"""`tandem logs`: kubectl logs over a service's pods."""

from pathlib import Path

from tandem_cli.target import find_target, replace_process
from tandem_cli.up import OPERATOR_NAMESPACE, OPERATOR_SELECTOR
from tandem_operator.names.labels import LABEL_ROLE, LABEL_SERVICE


def show_logs(
    cluster: str,
    kubeconfig: Path | None,
    service: str,
    role: str,
    namespace: str,
    follow: bool,
    tail: int,
) -> None:
    """Replace this process with kubectl, which follows logs well."""
    target = find_target(cluster, kubeconfig)
    if service == "operator":
        selector, namespace = OPERATOR_SELECTOR, OPERATOR_NAMESPACE
    else:
        selector = f"{LABEL_SERVICE}={service}"
    if role:
        selector += f",{LABEL_ROLE}={role}"
    arguments = ["logs", "-n", namespace, "-l", selector, "--prefix", f"--tail={tail}"]
    arguments += ["--all-containers", "--max-log-requests=64", *(["-f"] if follow else [])]
    replace_process(target, "kubectl", arguments)
