"""Pods on their node's network: ports that no two of them share, and DNS that knows Services.

A node has each port once, for all services and for every other process. So a worker gets three
ports of its own when its pod is made. They are not declared as container ports, which Kubernetes
would make host ports, without which the scheduler is free to put workers anywhere. If another
process has one of the ports, the worker ends at once, and the one that replaces it has another
name, thus other ports.
"""

import json
from collections.abc import Collection
from typing import Any, Final

from tandem_operator.facts.worker import WorkerPorts
from tandem_operator.names import router as router_flags
from tandem_operator.names import worker as worker_flags
from tandem_operator.names.annotations import (
    ANNOTATION_BOOTSTRAP_PORT,
    ANNOTATION_HTTP_PORT,
    ANNOTATION_WIRE_PORT,
)
from tandem_operator.names.objects import stable_number
from tandem_operator.names.pods import (
    ENGINE_CONTAINER,
    NODE_PORTS_ROUTER,
    NODE_PORTS_WORKER,
    PORT_NAME_BOOTSTRAP,
    PORT_NAME_HTTP,
    PORT_NAME_METRICS,
    PORT_NAME_WIRE,
    ROUTER_CONTAINER,
)

DNS_POLICY: Final = "ClusterFirstWithHostNet"
"""The default, ClusterFirst, means the node's own DNS for pods on the node's network."""
_WORKER_PORT_NAMES: Final = (PORT_NAME_HTTP, PORT_NAME_WIRE, PORT_NAME_BOOTSTRAP)
_PROBES: Final = ("startupProbe", "readinessProbe", "livenessProbe")


def choose_ports(namespace: str, pod: str, taken: Collection[int]) -> WorkerPorts:
    """Three ports for a worker: from its name, and none of `taken`."""
    size = len(_WORKER_PORT_NAMES)
    places = len(NODE_PORTS_WORKER) // size
    first = stable_number(namespace, pod)
    for step in range(places):
        start = NODE_PORTS_WORKER[size * ((first + step) % places)]
        if not any(port in taken for port in range(start, start + size)):
            return WorkerPorts(*range(start, start + size))
    raise AssertionError(f"all of {places} places for workers on nodes' networks are taken")


def port_annotations(ports: WorkerPorts) -> dict[str, str]:
    """Where the operator, routers and peers read a worker's ports."""
    return {
        ANNOTATION_HTTP_PORT: str(ports.http),
        ANNOTATION_WIRE_PORT: str(ports.wire),
        ANNOTATION_BOOTSTRAP_PORT: str(ports.bootstrap),
    }


def used_ports(pod: dict[str, Any]) -> frozenset[int]:
    """The ports that a worker pod was made with; one like a pod of an older release tells fewer."""
    notes = pod["metadata"]["annotations"]
    return frozenset(int(notes[name]) for name in port_annotations(WorkerPorts()) if name in notes)


def move_worker(pod: dict[str, Any], taken: Collection[int]) -> dict[str, Any]:
    """The worker pod with ports and DNS for its node's network, if it uses that."""
    if not pod["spec"].get("hostNetwork"):
        return pod
    meta = pod["metadata"]
    ports = choose_ports(meta["namespace"], meta["name"], taken)
    return {
        **pod,
        "metadata": {**meta, "annotations": {**meta["annotations"], **port_annotations(ports)}},
        "spec": {
            "dnsPolicy": DNS_POLICY,
            **pod["spec"],
            "containers": [
                _move_engine(item, ports) if item["name"] == ENGINE_CONTAINER else item
                for item in pod["spec"]["containers"]
            ],
        },
    }


def _move_engine(container: dict[str, Any], ports: WorkerPorts) -> dict[str, Any]:
    moved = dict(container)
    declared = container.get("ports") or []
    moved["ports"] = [port for port in declared if port.get("name") not in _WORKER_PORT_NAMES]
    args = list(container.get("args") or [])
    for flag, number in (
        (worker_flags.FLAG_HTTP_PORT, ports.http),
        (worker_flags.FLAG_WIRE_PORT, ports.wire),
        (worker_flags.FLAG_BOOTSTRAP_PORT, ports.bootstrap),
    ):
        args = _with_flag(args, flag, number)
    moved["args"] = args
    for name in _PROBES:
        probe = container.get(name) or {}
        if "httpGet" in probe:
            moved[name] = {**probe, "httpGet": {**probe["httpGet"], "port": ports.http}}
    return moved


def move_router(template: dict[str, Any], namespace: str, name: str) -> dict[str, Any]:
    """The pod template of routers with ports and DNS for their nodes' network, if they use that.

    Its ports depend on all of the template, so routers of two roll-outs fit on one node. They are
    declared, because the Service finds one by name, and so that the scheduler keeps routers of one
    service on different nodes.
    """
    spec = template["spec"]
    if not spec.get("hostNetwork"):
        return template
    number = stable_number(namespace, name, json.dumps(template, sort_keys=True))
    port = NODE_PORTS_ROUTER[2 * (number % (len(NODE_PORTS_ROUTER) // 2))]
    containers = [
        _move_router_container(item, port, port + 1) if item["name"] == ROUTER_CONTAINER else item
        for item in spec["containers"]
    ]
    moved = {"dnsPolicy": DNS_POLICY, **spec, "containers": containers}
    return {**template, "spec": moved}


def _move_router_container(container: dict[str, Any], http: int, metrics: int) -> dict[str, Any]:
    moved = {PORT_NAME_HTTP: http, PORT_NAME_METRICS: metrics}
    ports = [
        {**item, "containerPort": moved.get(item.get("name"), item["containerPort"])}
        for item in container.get("ports") or []
    ]
    args = _with_flag(list(container.get("args") or []), router_flags.FLAG_PORT, http)
    args = _with_flag(args, router_flags.FLAG_METRICS_PORT, metrics)
    return {**container, "ports": ports, "args": args}


def _with_flag(args: list[str], flag: str, number: int) -> list[str]:
    name = f"--{flag}"
    if name not in args:
        return [*args, name, str(number)]
    place = args.index(name) + 1
    return [*args[:place], str(number), *args[place + 1 :]]
