"""`tandem cluster`: the embedded cluster without anything installed in it."""

import dataclasses
import json

import typer
from rich.table import Table

from tandem_cli.console import console, show_steps
from tandem_cli.errors import CliError, NotRunning


def start_cluster(name: str, nodes: int, gpus: int, rdma: int) -> None:
    """Bring up `nodes` nodes that advertise the given extended resources."""
    from tandem_local.errors import LocalError

    from tandem_local import ClusterSpec, LocalCluster, NodeSpec

    resources = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    if rdma:
        resources["rdma/ib"] = str(rdma)
    spec = ClusterSpec(
        name=name,
        nodes=tuple(NodeSpec(f"node-{i}", resources=dict(resources)) for i in range(nodes)),
    )
    try:
        with show_steps() as steps:
            cluster = LocalCluster.up(spec, progress=steps.update)
    except LocalError as error:
        raise CliError(str(error), error.remedy) from error
    console.print(f"cluster {name!r} is ready: export KUBECONFIG={cluster.kubeconfig}")


def show_cluster(name: str, output: str) -> None:
    """Components with their pids and restarts, and nodes."""
    from tandem_local import LocalCluster

    found = LocalCluster.find(name)
    if found is None:
        raise NotRunning(f"no embedded cluster named {name!r} is running", "run `tandem up`")
    status = found.status()
    if output == "json":
        typer.echo(json.dumps(dataclasses.asdict(status), default=str, indent=2))
        return
    table = Table("COMPONENT", "NODE", "PID", "STATE", "RESTARTS", box=None)
    for item in status.components:
        table.add_row(
            item.name, item.node or "-", str(item.pid or "-"), item.state, str(item.restarts)
        )
    console.print(table)
