"""`tandem up`: cluster, chart, manifest, Ready, and an answer from the model."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tandem_cli.console import Steps, console, show_steps
from tandem_cli.errors import CliError
from tandem_cli.model_cache import use_cache
from tandem_cli.target import find_url, forward_hint, get_items, repository_file
from tandem_cli.waiting import PodWatch
from tandem_operator.names.labels import LABEL_SERVICE

if TYPE_CHECKING:
    from tandem_local import Cluster

RELEASE = "tandem"
OPERATOR_NAMESPACE = "tandem-system"
OPERATOR_SELECTOR = "app.kubernetes.io/component=operator"
OPERATOR_TIMEOUT_S = 180.0
# Between two questions to the API server, and between two looks at all pods.
POLL_S, LOOK_S = 0.5, 2.0


def bring_up(
    cluster: str,
    kubeconfig: Path | None,
    manifest: Path | None,
    chart: Path | None,
    prompt: str,
    timeout: int,
) -> None:
    """Do everything. Every step is idempotent, so a second run continues where the first stopped.

    Raises CliError with the reason of the condition that is not true when the service does not
    become Ready within `timeout` seconds.
    """
    started = time.monotonic()
    manifest = manifest or repository_file("examples/quickstart.yaml", "--manifest")
    chart = chart or repository_file("charts/tandem", "--chart")
    service = _service_of(manifest)
    with show_steps() as steps:
        target = _start(cluster, kubeconfig, steps)
        install_chart(target, chart, steps)
        steps.update("apply", 0.0, manifest.name)
        text = manifest.read_text()
        if kubeconfig is None:
            text = _with_cache(text)
        target.kubectl("apply", "-f", "-", input=text)
        steps.update("apply", 1.0, manifest.name)
        wait_ready(target, service, timeout, steps)
    _answer(target, service, prompt)
    name = service["metadata"]["name"]
    console.print(f"[dim]ready and answered in {time.monotonic() - started:.0f} s[/]")
    console.print(
        "next: [bold]tandem status[/], [bold]tandem chat[/], "
        f"[bold]tandem kubectl get tisvc,tpool,pods[/], [bold]tandem logs {name}[/]",
        soft_wrap=True,
    )


def _start(cluster: str, kubeconfig: Path | None, steps: Steps) -> "Cluster":

    from tandem_local import ClusterSpec, LocalCluster, NodeSpec, default_images

    if kubeconfig is not None:
        from tandem_cli.target import find_target

        return find_target(cluster, kubeconfig)
    node = NodeSpec("node-0", resources={"nvidia.com/gpu": "8"})
    images = default_images(Path(sys.executable).parent)
    found = LocalCluster.up(ClusterSpec(cluster, (node,), images), progress=steps.follow)
    steps.update("start", 1.0, "cluster is ready")
    return found


def install_chart(target: "Cluster", chart: Path, steps: Steps) -> None:
    """Install or upgrade the operator with the real helm, and wait until it runs.

    helm's own --wait would say nothing for minutes, and then not why.
    """
    steps.update("operator", 0.0, "helm upgrade --install")
    target.helm(
        *("upgrade", "--install", RELEASE, str(chart)),
        *("--namespace", OPERATOR_NAMESPACE, "--create-namespace"),
    )
    pods = PodWatch(target, OPERATOR_NAMESPACE, OPERATOR_SELECTOR)
    pods.renew()
    deadline = time.monotonic() + OPERATOR_TIMEOUT_S
    arguments = ("-n", OPERATOR_NAMESPACE, "-l", OPERATOR_SELECTOR)
    while not all(map(is_rolled_out, get_items(target, "deployment", *arguments))):
        pods.check("the operator")
        if time.monotonic() > deadline:
            raise CliError(
                f"the operator is not available after {OPERATOR_TIMEOUT_S:.0f} s",
                f"see `tandem kubectl describe pods -n {OPERATOR_NAMESPACE}` and "
                "`tandem logs operator`",
            )
        time.sleep(POLL_S)
    steps.update("operator", 1.0, "installed")


def is_rolled_out(deployment: dict[str, Any]) -> bool:
    """Whether every replica of a Deployment is of its current template, and available."""
    status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    counts = [status.get(f"{what}Replicas", 0) for what in ("updated", "available")]
    current: bool = status.get("observedGeneration") == deployment["metadata"]["generation"]
    return current and [status.get("replicas", 0), *counts] == [wanted] * 3


def wait_ready(target: "Cluster", service: dict[str, Any], timeout: int, steps: Steps) -> None:
    """Wait for the condition Ready. Shows the pools meanwhile, and the reason if it fails."""
    name, namespace = service["metadata"]["name"], service["metadata"].get("namespace", "default")
    watches = {
        f"service {namespace}/{name}": PodWatch(target, namespace, f"{LABEL_SERVICE}={name}"),
        "the operator": PodWatch(target, OPERATOR_NAMESPACE, OPERATOR_SELECTOR),
    }
    watches[f"service {namespace}/{name}"].renew()
    deadline = time.monotonic() + timeout
    note = ""
    next_look = 0.0
    while time.monotonic() < deadline:
        seen = json.loads(
            target.kubectl("get", "tisvc", name, "-n", namespace, "-o", "json").stdout
        )
        fraction, note, ready = readiness(seen)
        steps.update(f"service {name}", fraction, note)
        if ready:
            return
        if time.monotonic() >= next_look:
            for what, pods in watches.items():
                pods.check(what)
            next_look = time.monotonic() + LOOK_S
        time.sleep(POLL_S)
    raise CliError(
        f"service {namespace}/{name} is not Ready after {timeout} s: {note}",
        f"see `tandem kubectl describe tisvc {name} -n {namespace}` and `tandem logs {name}`",
    )


def readiness(service: dict[str, Any]) -> tuple[float, str, bool]:
    """(share of parts that are ready, what is still missing, whether the service is Ready)."""
    status = service.get("status", {})
    conditions = {c["type"]: c for c in status.get("conditions", [])}
    ready = conditions.get("Ready", {})
    current = status.get("observedGeneration") == service["metadata"].get("generation")
    if ready.get("status") == "True" and current:
        return 1.0, "ready", True
    parts = ["PrefillReady", "DecodeReady", "RouterReady", "TransportVerified"]
    done = sum(conditions.get(part, {}).get("status") == "True" for part in parts)
    pools = ", ".join(
        f"{pool['role'].lower()} {pool.get('ready', 0)}/{pool.get('desired', 0)}"
        for pool in status.get("pools", [])
    )
    waiting = ready.get("message") or "waiting for the operator"
    return done / (len(parts) + 1), f"{pools or waiting}", False


def _service_of(manifest: Path) -> dict[str, Any]:
    for document in yaml.safe_load_all(manifest.read_text()):
        if document and document.get("kind") == "InferenceService":
            service: dict[str, Any] = document
            return service
    raise CliError(
        f"{manifest} has no InferenceService", "use a manifest that has one, like examples/*.yaml"
    )


def _with_cache(manifest: str) -> str:
    """The manifest with a cache volume of the embedded cluster, which outlives it."""
    from tandem_local.folders import cache_dir

    documents = [document for document in yaml.safe_load_all(manifest) if document]
    return yaml.safe_dump_all(use_cache(documents, cache_dir() / "pods" / "models"))


def _answer(target: "Cluster", service: dict[str, Any], prompt: str) -> None:
    from tandem_cli.chat import ask_once, find_service_endpoint

    name, namespace = service["metadata"]["name"], service["metadata"].get("namespace", "default")
    with find_service_endpoint(target, name, namespace) as endpoint:
        answer = ask_once(endpoint, prompt, max_tokens=32)
    console.print(f"\n[bold]{prompt}[/]{answer.text}\n", soft_wrap=True)
    console.print(
        f"served by: router → [cyan]{answer.decode_worker}[/] (decode) ← "
        f"[cyan]{answer.prefill_worker or answer.decode_worker}[/] (prefill), "
        f"{answer.kv_bytes:,} bytes of KV moved between them",
        soft_wrap=True,
    )
    shown = json.loads(target.kubectl("get", "service", name, "-n", namespace, "-o", "json").stdout)
    url = find_url(target, shown)
    console.print(
        f"endpoint: {f'{url}/v1' if url else forward_hint(name, namespace)}\n"
        f"in the cluster: http://{name}.{namespace}.svc:{shown['spec']['ports'][0]['port']}/v1",
        soft_wrap=True,
    )
