"""The operator's own rights, its standby, and its recovery from a dead API server."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from deadlines import patience

from tests.service import Service, mock_manifest
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NAMESPACE = "tandem-system"
OWN_SECRET = "tandem-operator-admin-key"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:tandem-operator"


@pytest.fixture(scope="module")
def guarded(tandem: Any) -> Iterator[Service]:
    with Service.running(tandem, mock_manifest("guarded", decode=1)) as service:
        yield service


@pytest.fixture(scope="module")
def operator(tandem: Any) -> Service:
    return Service(tandem, "operator", NAMESPACE)


def may(tandem: Any, account: str, *what: str) -> bool:
    done = tandem.kubectl("auth", "can-i", *what, f"--as={account}", check=False)
    assert done.stdout.strip() in ("yes", "no"), done.stderr
    return bool(done.stdout.strip() == "yes")


def test_the_operator_cannot_read_secrets(tandem: Any) -> None:
    """It makes those of its workers; of its own it reads one. Any other verb shows a Secret too."""
    for verb in ("get", "list", "watch", "patch", "update", "delete", "deletecollection"):
        assert not may(tandem, ACCOUNT, verb, "secrets", "-A")
        assert not may(tandem, ACCOUNT, verb, "secrets", "-n", NAMESPACE)
    own = f"secret/{OWN_SECRET}"
    assert may(tandem, ACCOUNT, "get", own, "-n", NAMESPACE)
    assert not may(tandem, ACCOUNT, "get", own, "-n", "default")
    listed = tandem.kubectl("auth", "can-i", "--list", f"--as={ACCOUNT}").stdout
    print(listed)
    assert "inferenceservices.tandem.dev" in listed  # it is this account's list
    (secrets,) = (line for line in listed.splitlines() if line.startswith("secrets "))
    assert secrets.split()[-1] == "[create]"
    assert "*.*" not in listed


def test_the_operator_gives_no_more_than_it_has(tandem: Any) -> None:
    for verb in ("escalate", "bind"):
        assert not may(tandem, ACCOUNT, verb, "roles.rbac.authorization.k8s.io", "-n", "default")
    assert not may(tandem, ACCOUNT, "impersonate", "serviceaccounts", "-A")
    assert not may(tandem, ACCOUNT, "create", "clusterrolebindings")


def test_everybody_may_see_the_operator_s_heartbeat(tandem: Any) -> None:
    anybody = ("--as-group=system:authenticated", "-n", NAMESPACE)
    assert may(tandem, "anybody", "get", "leases.coordination.k8s.io/tandem-operator", *anybody)
    for verb in ("list", "update", "delete"):
        assert not may(tandem, "anybody", verb, "leases.coordination.k8s.io", *anybody)


def test_routers_read_pods_and_workers_nothing(tandem: Any, guarded: Service) -> None:
    router = f"system:serviceaccount:{guarded.namespace}:{guarded.name}-router"
    worker = f"system:serviceaccount:{guarded.namespace}:{guarded.name}-worker"
    assert may(tandem, router, "watch", "pods")
    for verb, kind in (("delete", "pods"), ("get", "secrets"), ("create", "pods/exec")):
        assert not may(tandem, router, verb, kind)
    for verb, kind in (("get", "pods"), ("get", "secrets"), ("list", "nodes")):
        assert not may(tandem, worker, verb, kind)


def set_decode(service: Service, replicas: int) -> None:
    patch = json.dumps({"spec": {"decode": {"replicas": replicas}}})
    service.kubectl("patch", "tisvc", service.name, "--type=merge", "-p", patch)


def test_it_recovers_from_a_killed_api_server(guarded: Service, operator: Service) -> None:
    restarts = container_restarts(operator)
    guarded.cluster.kill("kube-apiserver")

    def answers() -> bool:
        done = guarded.cluster.kubectl("get", "--raw", "/readyz", check=False)
        return bool(done.stdout == "ok")

    wait_for("the API server answers", answers, 90)
    set_decode(guarded, 2)
    guarded.wait_pool("Decode", 2)
    assert container_restarts(operator) == restarts


def container_restarts(operator: Service) -> dict[str, int]:
    pods = json.loads(operator.kubectl("get", "pods", "-o", "json"))["items"]
    return {
        p["metadata"]["name"]: p["status"]["containerStatuses"][0]["restartCount"] for p in pods
    }


def test_a_standby_is_passive_and_takes_over(guarded: Service, operator: Service) -> None:
    operator.kubectl("scale", "deployment/tandem-operator", "--replicas=2")
    try:
        operator.kubectl(
            "rollout", "status", "deployment/tandem-operator", "--timeout=90s", timeout=100
        )
        first = holder(operator)
        pods = {
            pod["metadata"]["name"]: pod["status"]["podIP"]
            for pod in json.loads(operator.kubectl("get", "pods", "-o", "json"))["items"]
        }
        assert len(pods) == 2
        (standby,) = set(pods) - {first}
        before = passes(pods[first])
        set_decode(guarded, 1)
        guarded.wait_pool("Decode", 1)
        assert passes(pods[first]) > before
        assert passes(pods[standby]) == 0
        die(operator, first)
        died = time.monotonic()
        wait_for("another replica leads", lambda: holder(operator) not in ("", first), 20)
        print(f"another replica led {time.monotonic() - died:.1f} s after the first one's death")
        set_decode(guarded, 2)
        guarded.wait_pool("Decode", 2)
    finally:
        operator.kubectl("scale", "deployment/tandem-operator", "--replicas=1")


def die(operator: Service, pod: str) -> None:
    """Kill the pod with SIGKILL, so that it neither gives the lease back nor restarts in place."""
    for pid in operator.cluster.container_pids(NAMESPACE, pod):
        os.kill(pid, signal.SIGKILL)
    operator.kubectl("delete", "pod", pod, "--grace-period=0", "--force", "--wait=false")


def holder(operator: Service) -> str:
    """The pod of the leader."""
    path = "jsonpath={.spec.holderIdentity}"
    return operator.kubectl("get", "lease", "tandem-operator", "-o", path).strip()


def passes(address: str) -> float:
    """The number of reconcile passes of a replica, from its own metrics."""
    text = httpx.get(f"http://{address}:9090/metrics", timeout=patience(10)).text
    counts = re.findall(r"^tandem_operator_reconcile_seconds_count\{.*\} (\S+)$", text, re.M)
    return sum(map(float, counts))
