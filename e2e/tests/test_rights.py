"""The operator's own rights, and its standby."""

import os
import signal
from typing import Any

import pytest

from tests.service import Service, mock_manifest
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NAMESPACE = "tandem-system"


def test_the_operator_cannot_read_secrets(tandem: Any) -> None:
    account = f"system:serviceaccount:{NAMESPACE}:tandem-operator"
    for verb in ("get", "list", "watch"):
        done = tandem.kubectl(
            "auth", "can-i", verb, "secrets", "-A", f"--as={account}", check=False
        )
        assert done.stdout.strip() == "no"
    listed = tandem.kubectl("auth", "can-i", "--list", f"--as={account}").stdout
    assert "secrets" not in listed
    assert "*.*" not in listed


def test_a_standby_takes_over(tandem: Any) -> None:
    operator = Service(tandem, "operator", NAMESPACE)

    def holder() -> str:
        return operator.kubectl(
            "get", "lease", "tandem-operator", "-o", "jsonpath={.spec.holderIdentity}"
        ).strip()

    operator.kubectl("scale", "deployment/tandem-operator", "--replicas=2")
    operator.kubectl(
        "rollout", "status", "deployment/tandem-operator", "--timeout=90s", timeout=100
    )
    first = holder()
    try:
        for name in operator.kubectl("get", "pods", "-o", "name").split():
            pod = name.removeprefix("pod/")
            if first.startswith(pod):
                for pid in tandem.container_pids(NAMESPACE, pod):
                    os.kill(pid, signal.SIGKILL)
        wait_for("another replica leads", lambda: holder() not in ("", first), 25)
        service = Service.apply(tandem, mock_manifest("after", decode=1)).wait_ready()
        service.delete()
    finally:
        operator.kubectl("scale", "deployment/tandem-operator", "--replicas=1")
