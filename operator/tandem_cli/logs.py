"""`tandem logs`: kubectl logs over a service's pods."""

from pathlib import Path

from tandem_cli.errors import CliError
from tandem_cli.target import find_target, replace_process
from tandem_cli.up import OPERATOR_NAMESPACE, OPERATOR_SELECTOR
from tandem_operator.names.labels import LABEL_ROLE, LABEL_SERVICE


def show_logs(
    cluster: str,
    kubeconfig: Path | None,
    service: str,
    role: str | None,
    namespace: str | None,
    follow: bool,
    tail: int,
) -> None:
    """Replace this process with kubectl, which follows logs well."""
    if service == "operator" and (role or namespace):
        raise CliError(
            f"the operator has no role, and is in {OPERATOR_NAMESPACE}",
            "leave out --role and --namespace",
        )
    target = find_target(cluster, kubeconfig)
    selector = f"{LABEL_SERVICE}={service}"
    if service == "operator":
        selector, namespace = OPERATOR_SELECTOR, OPERATOR_NAMESPACE
    if role:
        selector += f",{LABEL_ROLE}={role}"
    arguments = ["logs", "-n", namespace or "default", "-l", selector, "--prefix", f"--tail={tail}"]
    arguments += ["--all-containers", "--max-log-requests=64", *(["-f"] if follow else [])]
    replace_process(target, "kubectl", arguments)
