"""Releases of the operator, installed by the real helm, also beside the session's own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deadlines import patience

from tests.waiting import wait_for

CHART = Path(__file__).resolve().parents[2] / "charts/tandem"
KINDS = ("inferenceservices", "workerpools", "autoscalingpolicies")
CRDS = tuple(f"{kind}.tandem.dev" for kind in KINDS)
OWN = ("tandem", "tandem-system")
"""The release of the session, and its namespace."""


def install(cluster: Any, release: str, namespace: str, *values: str) -> None:
    """`helm upgrade --install`, until the operator's pod is ready."""
    sets = [item for value in values for item in ("--set", value)]
    cluster.helm(
        *("upgrade", "--install", release, str(CHART), "--namespace", namespace, *sets),
        *("--create-namespace", "--wait", "--timeout", "180s"),
    )


def uninstall(cluster: Any, release: str, namespace: str) -> None:
    """`helm uninstall`, until the operator has ended."""
    cluster.helm("uninstall", release, "-n", namespace, "--ignore-not-found")
    wait_for("the operator ends", lambda: not operator_pods(cluster, namespace), 60)


@contextmanager
def installed(cluster: Any, release: str, namespace: str, *values: str) -> Iterator[None]:
    """A release for the time of a test; it leaves the CRDs as they were."""
    try:
        install(cluster, release, namespace, "crds.install=false", *values)
        yield
    finally:
        uninstall(cluster, release, namespace)
        cluster.kubectl("delete", "namespace", namespace, "--ignore-not-found", "--wait=false")


@contextmanager
def without_own(cluster: Any) -> Iterator[None]:
    """The time in which the session's own operator doesn't run."""
    release, namespace = OWN
    deployment = f"deployment/{release}-operator"
    cluster.kubectl("-n", namespace, "scale", deployment, "--replicas=0")
    wait_for("the operator ends", lambda: not operator_pods(cluster, namespace), 60)
    try:
        yield
    finally:
        cluster.kubectl("-n", namespace, "scale", deployment, "--replicas=1")
        cluster.kubectl(
            "-n", namespace, "rollout", "status", deployment, "--timeout=120s", timeout=130
        )


def operator_pods(cluster: Any, namespace: str) -> list[dict[str, Any]]:
    """The pods of the operator in a namespace."""
    selector = "app.kubernetes.io/component=operator"
    text = cluster.kubectl("-n", namespace, "get", "pods", "-l", selector, "-o", "json").stdout
    items: list[dict[str, Any]] = json.loads(text)["items"]
    return items


def wait_for_collector(cluster: Any) -> None:
    """Wait until Kubernetes' garbage collector knows the kinds of CRDs that are new.

    It looks for new kinds twice a minute; only then does it end a deletion in the foreground.
    """
    meta = {"name": "for-the-collector", "namespace": "default"}
    policy = {"apiVersion": "tandem.dev/v1alpha1", "kind": "AutoscalingPolicy", "metadata": meta}
    cluster.kubectl("create", "-f", "-", input=json.dumps({**policy, "spec": {}}))
    cluster.kubectl(
        *("delete", KINDS[2], meta["name"], "-n", "default", "--cascade=foreground"),
        timeout=patience(120),
    )


def exists(cluster: Any, kind: str, name: str) -> bool:
    """Whether there is an object that lives in no namespace."""
    return bool(cluster.kubectl("get", kind, name, "--ignore-not-found", "-o", "name").stdout)


def crds(cluster: Any) -> list[str]:
    """The CRDs of Tandem that exist."""
    return [name for name in CRDS if exists(cluster, "crd", name)]
