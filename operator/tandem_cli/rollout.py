"""`tandem rollout`: the steps that a roll-out has before it; pause and resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from tandem_cli.console import results
from tandem_cli.errors import CliError, NotRunning
from tandem_cli.target import find_target, get_items
from tandem_operator.facts.child import ChildView
from tandem_operator.facts.observed import Observed
from tandem_operator.manifests.revision import model_id_of
from tandem_operator.names.objects import router_name
from tandem_operator.observe.objects import read_pools, read_router, read_spec, read_workers
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.rollout.counts import Counts
from tandem_operator.plan.rollout.preview import preview, preview_next
from tandem_operator.plan.rollout.revisions import build_goal, changes_model, count_workers

NEXT = "next"
"""Stands for the revision that an edit would make."""


def show_plan(
    cluster: str, kubeconfig: Path | None, service: str, namespace: str, output: str
) -> None:
    """Print the steps of the roll-out that is under way, or of one that an edit would start."""
    observed = observe_service(find_target(cluster, kubeconfig), service, namespace)
    assert observed.spec is not None, "it was read"
    target, desired = wanted_of(observed)
    if changes_model(observed, observed.spec, target):
        raise CliError(
            f"{service} changes its model, which is not done in steps: all workers of revision"
            f" {target} come up beside the old ones, then the routers change over",
            f"see how far it is: kubectl describe tisvc/{service} -n {namespace}",
        )
    goal = replace(build_goal(observed, observed.spec, target, desired), paused=False)
    counts = count_workers(observed, model_id_of(observed.spec))
    rolls = any(each.live for name, pair in counts.of.items() if name != target for each in pair)
    if rolls:
        steps = [counts, *preview(counts, goal)]
    else:
        target = NEXT
        steps = [counts, *preview_next(counts, goal, NEXT)]
    rows = [count_step(step, target) for step in steps]
    if output == "json":
        typer.echo(json.dumps({"revision": target, "rolling": rolls, "steps": rows}, indent=2))
        return
    said = f"to revision {target}" if rolls else "that an edit of the workers would start"
    results.print(f"The roll-out {said}, if every new worker becomes ready:")
    if observed.spec.rollout.paused:
        results.print(f"It is paused: tandem rollout resume {service} -n {namespace}")
    results.print(build_table(rows))


def set_paused(
    cluster: str, kubeconfig: Path | None, service: str, namespace: str, *, paused: bool
) -> None:
    """Write `rollout.paused`."""
    target = find_target(cluster, kubeconfig)
    patch = json.dumps({"spec": {"rollout": {"paused": paused}}})
    done = target.kubectl(
        "patch", "tisvc", service, "-n", namespace, "--type=merge", "-p", patch, check=False
    )
    if done.returncode:
        raise CliError(
            f"rollout.paused of {service} can't be set: {done.stderr.strip()}",
            "tandem status lists the services",
        )
    results.print(f"{service}: roll-outs are {'paused' if paused else 'not paused'}")


def observe_service(target: Any, service: str, namespace: str) -> Observed:
    """What the API server has of a service, as the operator reads it. Raises NotRunning."""
    where = ("-n", namespace)
    own = (*where, "-l", f"tandem.dev/service={service}")
    found = [
        item for item in get_items(target, "tisvc", *where) if item["metadata"]["name"] == service
    ]
    if not found:
        raise NotRunning(
            f"there is no InferenceService {service} in {namespace}",
            "tandem status lists the services",
        )
    meta = found[0]["metadata"]
    spec, problem = read_spec(found[0])
    if spec is None:
        raise CliError(f"the spec of {service} can't be read: {problem}", "correct these fields")
    pools = read_pools(service, meta["uid"], get_items(target, "tpool", *own))
    routers = [
        read_router(item)
        for item in get_items(target, "deployments", *own)
        if item["metadata"]["name"] == router_name(service)
    ]
    return Observed(
        name=service,
        namespace=namespace,
        uid=meta["uid"],
        generation=meta["generation"],
        spec=spec,
        pools=pools,
        pods=read_workers(get_items(target, "pods", *own), pools),
        router=routers[0] if routers else None,
        children=tuple(
            ChildView(
                "ControllerRevision",
                item["metadata"]["name"],
                item["metadata"]["uid"],
                frozenset(owner["uid"] for owner in item["metadata"].get("ownerReferences", ())),
            )
            for item in get_items(target, "controllerrevisions", *own)
        ),
    )


def wanted_of(observed: Observed) -> tuple[str, Pair[int]]:
    """The revision and the numbers that the operator works towards. Raises NotRunning."""
    pools = [pool for pool in observed.pools if pool is not None]
    if len(pools) < len(Role) or any(pool.desired is None for pool in pools):
        raise NotRunning(
            f"{observed.name} has no workers yet", "wait until the operator has made its pools"
        )
    prefill, decode = pools
    return prefill.revision, Pair(prefill.desired or 0, decode.desired or 0)


def count_step(counts: Counts, target: str) -> dict[str, dict[str, int]]:
    """The workers of both pools, new and old."""
    return {
        str(role): {
            "new": counts.get(target).of(role).live,
            "old": sum(p.of(role).live for name, p in counts.of.items() if name != target),
        }
        for role in Role
    }


def build_table(rows: list[dict[str, dict[str, int]]]) -> Table:
    """A line for each step, which tells what it starts and drains."""
    table = Table("STEP", "PREFILL NEW/OLD", "DECODE NEW/OLD", "WHAT HAPPENS", box=None)
    for number, row in enumerate(rows):
        said = describe(rows[number - 1], row) if number else "now"
        numbers = [f"{row[role]['new']}/{row[role]['old']}" for role in Role]
        table.add_row(str(number), *numbers, said)
    return table


def describe(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> str:
    """What one step does, in words."""
    parts = []
    for role in Role:
        started = after[role]["new"] - before[role]["new"]
        drained = before[role]["old"] - after[role]["old"]
        parts += [f"start {started} {role}"] if started > 0 else []
        parts += [f"drain {drained} {role}"] if drained > 0 else []
    return ", ".join(parts)
