"""What Prometheus scrapes of pods by a PodMonitor: service discovery and relabeling, as documented.

Only what the chart's monitor uses. A pod gives a target for each declared port of each container,
and one without port for a container that declares none.
"""

import re
from collections.abc import Iterator
from typing import Any

Labels = dict[str, str]


def scraped(monitor: dict[str, Any], pod: dict[str, Any]) -> list[str]:
    """The addresses that are scraped of a pod, whose labels the monitor selects; each once."""
    found: dict[tuple[tuple[str, str], ...], str] = {}
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        for target in _targets(pod):
            if "port" in endpoint:
                if target.get("__meta_kubernetes_pod_container_port_name") != endpoint["port"]:
                    continue
                target["endpoint"] = endpoint["port"]
            for rule in endpoint.get("relabelings", []):
                if not _relabel(rule, target):
                    break
            else:
                kept = {k: v for k, v in target.items() if not k.startswith("__meta_")}
                found[tuple(sorted(kept.items()))] = target["__address__"]
    return list(found.values())


def _targets(pod: dict[str, Any]) -> Iterator[Labels]:
    meta, ip = pod["metadata"], pod["status"]["podIP"]
    host = f"[{ip}]" if ":" in ip else ip
    common = {
        "__meta_kubernetes_pod_ip": ip,
        "__meta_kubernetes_pod_host_ip": pod["status"]["hostIP"],
        **{f"__meta_kubernetes_pod_label_{_safe(k)}": v for k, v in meta["labels"].items()},
        **{
            f"__meta_kubernetes_pod_annotation_{_safe(k)}": v
            for k, v in meta["annotations"].items()
        },
    }
    for container in pod["spec"]["containers"]:
        named = {**common, "__meta_kubernetes_pod_container_name": container["name"]}
        ports = container.get("ports") or []
        if not ports:
            yield {**named, "__address__": ip}
        for port in ports:
            yield {
                **named,
                "__address__": f"{host}:{port['containerPort']}",
                "__meta_kubernetes_pod_container_port_name": port.get("name", ""),
            }


def _safe(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)


def _relabel(rule: dict[str, Any], target: Labels) -> bool:
    """Apply one rule; whether the target stays."""
    value = ";".join(target.get(name, "") for name in rule.get("sourceLabels", []))
    action = str(rule.get("action", "replace"))
    if action == "keepequal":
        return bool(value == target.get(rule["targetLabel"], ""))
    match = re.fullmatch(str(rule.get("regex", "(.*)")), value)
    if action in ("keep", "drop"):
        return (match is not None) == (action == "keep")
    assert action == "replace", action
    if match is not None:
        template = re.sub(r"\$(\d)", r"\\\1", rule.get("replacement", "$1"))
        target[rule["targetLabel"]] = match.expand(template)
    return True
