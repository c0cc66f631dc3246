"""A service at zero refuses with Retry-After and wakes; what can't start says why."""

from typing import Any

import httpx
import pytest

from tests.service import Service, mock_manifest
from tests.streams import completion
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

POLICY = {
    "pools": {"prefill": {"min": 1, "max": 2}, "decode": {"min": 1, "max": 2}},
    "scaleIn": {"hold": "Fixed", "minHoldSeconds": 0},
    "scaleToZero": {"enabled": True, "idleSeconds": 60},
}


def test_an_idle_service_goes_to_zero_and_a_request_wakes_it(tandem: Any) -> None:
    manifest = mock_manifest("asleep", 1, 1, autoscaling={"inline": POLICY})
    with Service.running(tandem, manifest) as service:
        service.wait_pool("Decode", 0, 180)
        service.wait_pool("Prefill", 0, 60)
        assert service.condition("RouterReady")["status"] == "True"
        assert service.condition("Progressing")["reason"] == "Stable"
        body = completion(service.name, "wake up", 4)
        body.pop("stream", None)
        answers = []

        def served() -> bool:
            answers.append(httpx.post(f"{service.url}/v1/completions", json=body, timeout=60))
            return answers[-1].status_code == 200

        wait_for("a request is served", served, 120)
        refused = [answer for answer in answers if answer.status_code != 200]
        assert all(answer.status_code == 503 for answer in refused)
        assert all("retry-after" in answer.headers for answer in refused)


def test_a_router_without_its_secret_says_so(tandem: Any) -> None:
    router = {"apiKeysSecretName": "nowhere"}
    service = Service.apply(tandem, mock_manifest("keyless", 0, 1, router=router))
    try:
        wait_for(
            "the missing secret is told",
            lambda: "nowhere" in service.condition("RouterReady").get("message", ""),
            90,
        )
        assert service.condition("RouterReady")["reason"] == "FailedMount"
    finally:
        service.kubectl("delete", "tisvc", service.name, "--wait=false")
