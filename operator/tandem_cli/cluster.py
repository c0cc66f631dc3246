"""`tandem cluster`: the embedded cluster without anything installed in it."""

import dataclasses
import json
import sys
from pathlib import Path

import typer
from rich.table import Table

from tandem_cli.console import console, results, show_steps


def start_cluster(name: str, nodes: int, gpus: int, rdma: int) -> None:
    """Bring up `nodes` nodes that advertise the given extended resources."""
    from tandem_local import ClusterSpec, LocalCluster, NodeSpec, default_images

    resources = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    if rdma:
        resources["rdma/ib"] = str(rdma)
    spec = ClusterSpec(
        name=name,
        nodes=tuple(NodeSpec(f"node-{i}", resources=dict(resources)) for i in range(nodes)),
        images=default_images(Path(sys.executable).parent),
    )
    with show_steps() as steps:
        cluster = LocalCluster.up(spec, progress=steps.follow)
    console.print(f"cluster {name!r} is ready: export KUBECONFIG={cluster.kubeconfig}")


def build_programs() -> None:
    """Build the cluster's programs into the cache, unless they are there."""
    from tandem_local import find_binaries

    with show_steps() as steps:
        binaries = find_binaries(steps.follow)
    console.print(f"the embedded cluster's programs are in {binaries.cluster.parent}")


def show_cluster(name: str, output: str) -> None:
    """Components with their pids and restarts, and nodes."""
    from tandem_local import LocalCluster

    status = LocalCluster.find(name).status()
    if output == "json":
        typer.echo(json.dumps(dataclasses.asdict(status), default=str, indent=2))
        return
    results.print(f"{status.name}: {status.phase}, API at {status.api_url}")
    table = Table("COMPONENT", "NODE", "PID", "RESTARTS", "MIB", "LOG", box=None)
    for item in status.components:
        table.add_row(
            item.name,
            item.node or "-",
            str(item.pid or "-"),
            str(item.restarts),
            str(item.rss_bytes >> 20),
            str(item.log),
        )
    results.print(table)
