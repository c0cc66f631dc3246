"""How an installation ends: nothing waits for an operator that is gone, and a new one works."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.release import (
    CHART,
    OWN,
    crds,
    exists,
    install,
    uninstall,
    wait_for_collector,
)
from tests.service import Service, mock_manifest
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

OTHER = ("other", "other-system")
NAMESPACE = "left-behind"


@pytest.fixture(autouse=True)
def restored(tandem: Any) -> Iterator[None]:
    """The session's own release again, whatever a test did."""
    tandem.kubectl("create", "namespace", NAMESPACE)
    yield
    uninstall(tandem, *OTHER)
    for name in (NAMESPACE, OTHER[1]):
        tandem.kubectl(
            "delete", "namespace", name, "--ignore-not-found", "--timeout=120s", timeout=130
        )
    install(tandem, *OWN)


def run_service(tandem: Any) -> Service:
    service = Service.apply(tandem, mock_manifest("left", decode=1), NAMESPACE)
    return service.wait_ready()


def leaves_nothing(tandem: Any, service: Service) -> None:
    """Wait until the CRDs, and everything that the operator made, are gone."""
    wait_for("the CRDs are gone", lambda: not crds(tandem), 60)
    kinds = "pods,deployments,services,roles,rolebindings,networkpolicies,poddisruptionbudgets"
    selector = "tandem.dev/service"
    wait_for(
        "nothing of the service is left",
        lambda: not service.kubectl("get", kinds, "-l", selector, "-o", "name"),
        120,
    )


def test_the_lines_of_the_notes_remove_everything_without_an_operator(tandem: Any) -> None:
    service = run_service(tandem)
    notes = tandem.helm("get", "notes", OWN[0], "-n", OWN[1]).stdout
    lines = [text.split()[1:] for text in notes.splitlines() if "kubectl delete" in text]
    assert [line[1] for line in lines] == ["inferenceservices", "crd"]
    before = {pod["metadata"]["uid"] for pod in service.pods()}
    uninstall(tandem, *OWN)
    # The services go on without an operator.
    assert {pod["metadata"]["uid"] for pod in service.pods()} == before
    assert crds(tandem)
    for line in lines:
        tandem.kubectl(*line, "--timeout=120s", timeout=130)
    leaves_nothing(tandem, service)
    install(tandem, *OWN)
    assert run_service(tandem).condition("Ready")["status"] == "True"


def test_a_release_of_another_name_can_take_its_crds_with_it(tandem: Any) -> None:
    uninstall(tandem, *OWN)
    tandem.kubectl("delete", "crd", *crds(tandem), "--timeout=60s", timeout=70)
    for _ in range(2):
        install(tandem, *OTHER, "crds.keep=false")
        service = run_service(tandem)
        wait_for_collector(tandem)
        uninstall(tandem, *OTHER)
        leaves_nothing(tandem, service)


def test_a_namespace_goes_with_its_services_when_no_operator_runs(tandem: Any) -> None:
    run_service(tandem)
    uninstall(tandem, *OWN)
    tandem.kubectl("delete", "namespace", NAMESPACE, "--timeout=90s", timeout=100)
    assert not exists(tandem, "namespace", NAMESPACE)
    tandem.kubectl("create", "namespace", NAMESPACE)


def test_kept_crds_go_over_to_a_release_of_another_name(tandem: Any) -> None:
    service = run_service(tandem)
    uninstall(tandem, *OWN)
    tandem.helm(
        *("install", OTHER[0], str(CHART), "-n", OTHER[1], "--create-namespace"),
        *("--take-ownership", "--wait", "--timeout", "180s"),
    )
    # The new operator serves what the old one left.
    patch = json.dumps({"spec": {"decode": {"replicas": 2}}})
    service.kubectl("patch", "tisvc", service.name, "--type=merge", "-p", patch)
    service.wait_pool("Decode", 2)
    # Whatever the release is called: all of it goes.
    command = [sys.executable, "-m", "tandem_cli.main", "uninstall"]
    subprocess.run([*command, "--kubeconfig", str(tandem.kubeconfig)], check=True)
    leaves_nothing(tandem, service)
    assert not tandem.helm("list", "-A", "-q").stdout.strip()
