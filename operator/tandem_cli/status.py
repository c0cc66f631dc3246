"""`tandem status`: what runs, for people and (`-o json`) for scripts."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from tandem_cli.console import results
from tandem_cli.heartbeat import read_heartbeats
from tandem_cli.target import find_target, find_url, forward_hint, get_items


def show_status(cluster: str, kubeconfig: Path | None, output: str) -> None:
    """Print kubeconfig, services, pools and every condition that needs attention."""
    target = find_target(cluster, kubeconfig)
    urls = {
        (item["metadata"]["namespace"], item["metadata"]["name"]): find_url(target, item)
        for item in get_items(target, "service", "-A")
    }
    services = [summarize(item, urls) for item in get_items(target, "tisvc", "-A")]
    beats = read_heartbeats(target, (service["operator"] for service in services))
    now = datetime.now(UTC)
    for service in services:
        service["operator"] = beats[service["operator"]].summary(now)
    document = {
        "url": services[0]["url"] if services else "",
        "clusterUrl": services[0]["clusterUrl"] if services else "",
        "kubeconfig": str(target.kubeconfig),
        "services": services,
    }
    if output == "json":
        typer.echo(json.dumps(document, indent=2))
        return
    table = Table(
        "SERVICE", "MODEL", "PREFILL", "DECODE", "READY", "URL", "URL IN THE CLUSTER", box=None
    )
    for service in services:
        pools = {pool["role"]: f"{pool['ready']}/{pool['desired']}" for pool in service["pools"]}
        table.add_row(
            f"{service['namespace']}/{service['name']}",
            service["model"],
            pools.get("Prefill", "-"),
            pools.get("Decode", "-"),
            readiness(service),
            service["url"] or "-",
            service["clusterUrl"],
        )
    results.print(f"kubeconfig: {target.kubeconfig}", soft_wrap=True)
    results.print(table)
    for problem in sorted({service["operator"]["problem"] for service in services} - {""}):
        results.print(f"  [red]{problem}[/]", soft_wrap=True)
    for service in services:
        if service["clusterUrl"] and not service["url"]:
            hint = forward_hint(service["name"], service["namespace"])
            results.print(f"  {service['name']}: from here, {hint}", soft_wrap=True)
        for condition in troubles(service["conditions"]):
            results.print(
                f"  {service['name']}: [yellow]{condition['type']}={condition['status']}[/] "
                f"{condition.get('reason', '')}: {condition.get('message', '')}",
                soft_wrap=True,
            )


def summarize(item: dict[str, Any], urls: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """The part of an InferenceService that `status` shows.

    `urls` has the URL of each Service, by namespace and name, that works from this machine.
    """
    status = item.get("status", {})
    name, namespace = item["metadata"]["name"], item["metadata"]["namespace"]
    return {
        "name": name,
        "namespace": namespace,
        "url": urls.get((namespace, name), ""),
        "clusterUrl": status.get("url", ""),
        "model": status.get("model", ""),
        "ratio": status.get("ratio", ""),
        "pools": status.get("pools", []),
        "router": status.get("router", {}),
        "slo": status.get("slo", {}),
        "transport": status.get("transport", {}),
        "scaling": status.get("scaling", []),
        "failures": status.get("failures", []),
        "conditions": status.get("conditions", []),
        "operator": status.get("operator", ""),
    }


def readiness(service: Mapping[str, Any]) -> str:
    """What the column READY says: a condition that no living operator keeps is not known."""
    if service["operator"]["problem"]:
        return "Unknown"
    return next((c["status"] for c in service["conditions"] if c["type"] == "Ready"), "?")


GOOD_WHEN_TRUE = frozenset(
    {"Ready", "PrefillReady", "DecodeReady", "RouterReady", "ModelReady", "TransportVerified"}
)
GOOD_WHEN_FALSE = frozenset(
    {"Degraded", "SLOInfeasible", "MetricsStale", "CapacityUnavailable", "GatedByPeer"}
)


def troubles(conditions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Conditions that need a person's attention."""
    return [
        c
        for c in conditions
        if (c["type"] in GOOD_WHEN_TRUE and c["status"] != "True")
        or (c["type"] in GOOD_WHEN_FALSE and c["status"] == "True")
    ]
