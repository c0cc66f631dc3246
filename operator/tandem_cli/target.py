"""The cluster that a command uses: an existing one that a kubeconfig names, or the embedded one."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem_cli.errors import CliError

if TYPE_CHECKING:
    from tandem_local import Cluster


def find_target(cluster: str, kubeconfig: Path | None) -> "Cluster":
    """The running cluster.

    Raises tandem_local's ClusterNotFound when there is none, RequirementError when the file is
    missing.
    """
    from tandem_local import ExternalCluster, LocalCluster

    return ExternalCluster(kubeconfig) if kubeconfig else LocalCluster.find(cluster)


def routes_services(target: "Cluster") -> bool:
    """Whether ClusterIPs can be reached from this machine, as those of the embedded cluster."""
    from tandem_local import LocalCluster

    return isinstance(target, LocalCluster)


def find_url(target: "Cluster", service: dict[str, Any]) -> str:
    """The URL of a Service, as kubectl prints it, that works from here; empty if there is none.

    From outside a cluster that is a load balancer's; into the embedded one there are routes.
    """
    spec = service["spec"]
    balancer = service.get("status", {}).get("loadBalancer", {}).get("ingress", [])
    hosts = [entry.get("hostname") or entry.get("ip") for entry in balancer]
    if routes_services(target):
        # A headless Service has no address of its own.
        hosts = [spec.get("clusterIP", "").replace("None", "")]
    for port in spec.get("ports", [])[:1]:
        for host in filter(None, hosts):
            return f"http://{f'[{host}]' if ':' in host else host}:{port['port']}"
    return ""


def forward_hint(name: str, namespace: str) -> str:
    """What to run for a URL of a service that has none outside its cluster."""
    return (
        f"tandem kubectl port-forward -n {namespace} service/{name} 8000, "
        "then http://127.0.0.1:8000"
    )


def passthrough(tool: str, arguments: list[str]) -> int:
    """Replace this process with kubectl or helm, with the cluster's kubeconfig."""
    name = os.environ.get("TANDEM_CLUSTER", "tandem")
    configured = os.environ.get("TANDEM_KUBECONFIG")
    target = find_target(name, Path(configured) if configured else None)
    replace_process(target, tool, arguments)
    return 0


def replace_process(target: "Cluster", tool: str, arguments: list[str]) -> None:
    """Replace this process with kubectl or helm, which then own terminal and exit code."""
    argv = target.kubectl_argv(*arguments) if tool == "kubectl" else target.helm_argv(*arguments)
    sys.stdout.flush()
    os.execvpe(argv[0], argv, target.environment())


def get_items(target: "Cluster", kind: str, *arguments: str) -> list[dict[str, Any]]:
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
        f"{relative} is not part of this installation",
        f"run from a checkout of Tandem, or give its path with {option}",
    )
