"""`tandem doctor`: what this machine, or each worker of a service, has for moving KV."""

import json
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from tandem_cli.console import results
from tandem_cli.target import find_target
from tandem_cli.workers import find_workers, last_line, run_inside
from tandem_engine.doctor.examine import examine, report
from tandem_operator.facts.worker import WorkerPod
from tandem_operator.names.pods import ENGINE_CONTAINER
from tandem_operator.names.worker import FLAG_TRANSFER
from tandem_wire.handoff import TransportChoice

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def examine_here(transfer: TransportChoice, output: str) -> None:
    """Check this machine or pod. Ends with code 1 if a check fails."""
    found = report(examine(wanted=transfer))
    if output == "json":
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(found)
    if not found["ok"]:
        raise typer.Exit(1)


def examine_workers(
    cluster: str, kubeconfig: Path | None, service: str, namespace: str, output: str
) -> None:
    """Check each worker of a service, inside of its pod. Ends with code 1 if a check fails."""
    target = find_target(cluster, kubeconfig)
    found = {}
    for pod in find_workers(target, service, namespace):
        command = ("tandem", "doctor", "-o", "json", f"--{FLAG_TRANSFER}={transfer_of(pod)}")
        done = run_inside(target, namespace, pod.name, *command)
        found[pod.name] = {"node": pod.node, **read_report(done.stdout, last_line(done))}
    if output == "json":
        typer.echo(json.dumps(found, indent=2))
    else:
        for name, checked in found.items():
            results.print(f"[bold]{name}[/] on {checked['node']}")
            _show(checked)
    if not all(checked["ok"] for checked in found.values()):
        raise typer.Exit(1)


def transfer_of(pod: WorkerPod) -> str:
    """The transport that a worker was started with."""
    containers: list[dict[str, Any]] = pod.manifest.get("spec", {}).get("containers", [])
    args: list[str] = []
    for container in containers:
        if container["name"] == ENGINE_CONTAINER:
            args = container.get("args", [])
    flag = f"--{FLAG_TRANSFER}"
    for number, arg in enumerate(args):
        if arg == flag and number + 1 < len(args):
            return args[number + 1]
        if arg.startswith(f"{flag}="):
            return arg.removeprefix(f"{flag}=")
    return "Auto"


def read_report(text: str, error: str) -> dict[str, Any]:
    """What `tandem doctor -o json` printed in a pod; a failed check if it printed nothing."""
    try:
        found: dict[str, Any] = json.loads(text)
        return {"ok": found["ok"], "checks": found["checks"]}
    except (ValueError, KeyError, TypeError):
        check = {
            "name": "exec",
            "subject": "tandem doctor",
            "verdict": "fail",
            "finding": f"it does not run in the pod: {error}",
            "remedy": "run the engine image of this release, and see that kubectl exec is allowed",
        }
        return {"ok": False, "checks": [check]}


def _show(found: dict[str, Any]) -> None:
    table = Table("", "CHECK", "OF", "FOUND", box=None)
    for check in found["checks"]:
        verdict = check["verdict"]
        told = escape(check["finding"])
        if check["remedy"]:
            told += f"\n[bold]remedy:[/] {escape(check['remedy'])}"
        colour = _COLOURS[verdict]
        table.add_row(f"[{colour}]{verdict}[/]", check["name"], escape(check["subject"]), told)
    results.print(table)
