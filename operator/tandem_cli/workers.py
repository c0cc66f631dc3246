"""The worker pods of a service, and commands that run inside of them."""

import subprocess
from typing import TYPE_CHECKING

from tandem_cli.errors import NotRunning
from tandem_cli.target import get_items
from tandem_operator.facts.worker import WorkerPod
from tandem_operator.names.labels import LABEL_SERVICE
from tandem_operator.names.pods import ADMIN_TOKEN_ENTRY, ADMIN_TOKEN_FOLDER, ENGINE_CONTAINER
from tandem_operator.observe.pod import read_pod
from tandem_operator.pair import Role

if TYPE_CHECKING:
    from tandem_local import Cluster

EXEC_SECONDS = 120.0


def find_workers(target: "Cluster", service: str, namespace: str) -> list[WorkerPod]:
    """The workers whose engine runs, prefill first. Raises NotRunning when there are none."""
    selector = f"{LABEL_SERVICE}={service}"
    pods = get_items(target, "pods", "-n", namespace, "-l", selector)
    found = [pod for pod in map(read_pod, pods) if pod is not None and pod.started]
    if not found:
        raise NotRunning(
            f"no worker of {service!r} runs in namespace {namespace!r}",
            "see `tandem status` for what runs and what holds it up",
        )
    return sorted(found, key=lambda pod: (pod.role is not Role.PREFILL, pod.name))


def run_inside(
    target: "Cluster", namespace: str, pod: str, *command: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a worker's engine container."""
    arguments = ("exec", "-n", namespace, pod, "-c", ENGINE_CONTAINER, "--", *command)
    return target.kubectl(*arguments, check=False, timeout=EXEC_SECONDS)


def call_admin(
    target: "Cluster", namespace: str, pod: WorkerPod, path: str, *body: str
) -> subprocess.CompletedProcess[str]:
    """Call a worker's /admin from inside its pod, so that the token stays there."""
    url = f"http://127.0.0.1:{pod.ports.http}{path}"
    token_file = f"{ADMIN_TOKEN_FOLDER}/{ADMIN_TOKEN_ENTRY}"
    command = ("python", "-m", "tandem_cli.admin_call", url, token_file, *body)
    return run_inside(target, namespace, pod.name, *command)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last thing that a command said, for an error."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1] if lines else f"it ended with code {done.returncode}"
