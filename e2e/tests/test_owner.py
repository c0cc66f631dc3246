"""Who serves a service: each namespace on its own, and one operator per service."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from deadlines import patience

from tests.release import installed, operator_pods, without_own
from tests.service import Service, mock_manifest
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SECOND = ("second", "second-system")


@pytest.fixture
def namespaces(tandem: Any) -> Iterator[tuple[str, str]]:
    """Two namespaces for one test."""
    names = (f"team-{uuid.uuid4().hex[:6]}", f"team-{uuid.uuid4().hex[:6]}")
    for name in names:
        tandem.kubectl("create", "namespace", name)
    yield names
    for name in names:
        tandem.kubectl("delete", "namespace", name, "--ignore-not-found", "--wait=false")


def readiness(tandem: Any, namespace: str) -> httpx.Response:
    """What the operator of a namespace answers at /readyz."""
    (pod,) = [pod for pod in operator_pods(tandem, namespace) if pod["status"].get("podIP")]
    return httpx.get(f"http://{pod['status']['podIP']}:8080/readyz", timeout=patience(10))


def test_a_deleted_namespace_ends_and_the_others_are_served(
    tandem: Any, namespaces: tuple[str, str]
) -> None:
    gone, stays = namespaces
    watched = (f"watchNamespaces={{{gone},{stays}}}", "rbac.readNodes=false")
    quick = "extraArgs={--resync-seconds=2}"
    with without_own(tandem), installed(tandem, *SECOND, *watched, quick):
        manifest = mock_manifest("mine", decode=1)
        for name in namespaces:
            Service.apply(tandem, manifest, name)
        for name in namespaces:
            Service(tandem, "mine", name).wait_ready()
        assert readiness(tandem, SECOND[1]).status_code == 200
        tandem.kubectl("delete", "namespace", gone, "--timeout=90s", timeout=100)
        # Both what runs and what starts again: each namespace is independent.
        for again in (False, True):
            if again:
                selector = "app.kubernetes.io/component=operator"
                tandem.kubectl("-n", SECOND[1], "delete", "pod", "-l", selector)
            number = 3 if again else 2
            patch = json.dumps({"spec": {"decode": {"replicas": number}}})
            service = Service(tandem, "mine", stays)
            service.kubectl("patch", "tisvc", "mine", "--type=merge", "-p", patch)
            service.wait_pool("Decode", number)
            wait_for(
                "readiness names the namespace that is not served",
                lambda: (
                    readiness(tandem, SECOND[1]).status_code == 503
                    and gone in readiness(tandem, SECOND[1]).text
                    and stays not in readiness(tandem, SECOND[1]).text
                ),
                60,
            )


def pod_uids(service: Service) -> set[str]:
    return {pod["metadata"]["uid"] for pod in service.pods()}


def owner(service: Service) -> str:
    return str(service.get().get("status", {}).get("operator", ""))


def test_two_releases_do_not_fight(tandem: Any, namespaces: tuple[str, str]) -> None:
    namespace = namespaces[0]
    # Another image than the first one's: if both worked, each would replace the other's pods.
    other = "images.engine.tag=other"
    service = Service.apply(tandem, mock_manifest("shared", decode=1), namespace).wait_ready()
    assert owner(service) == "tandem-system/tandem-operator"
    before = pod_uids(service)
    with installed(tandem, *SECOND, other):
        told = wait_for(
            "the other operator says so",
            lambda: [
                event
                for event in json.loads(service.kubectl("get", "events", "-o", "json"))["items"]
                if event["reason"] == "ServedByOther"
            ],
            60,
        )
        assert "tandem-system/tandem-operator" in told[0]["message"]
        ends = time.monotonic() + 20
        wait_for("the pods stay", lambda: pod_uids(service) != before or time.monotonic() > ends)
        assert pod_uids(service) == before
        assert owner(service) == "tandem-system/tandem-operator"
        with without_own(tandem):
            # Nobody serves it any more: the other one takes over, and keeps it.
            wait_for(
                "the other takes over", lambda: owner(service).startswith("second-system/"), 120
            )
        service.wait_ready()
        assert owner(service).startswith("second-system/")
    wait_for("the first takes it back", lambda: owner(service).startswith("tandem-system/"), 120)
