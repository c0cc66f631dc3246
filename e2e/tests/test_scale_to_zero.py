"""A service at zero refuses with Retry-After and wakes; what can't start says why."""

import asyncio
import time
from typing import Any

import httpx
import pytest
from deadlines import patience

from tests.service import Service, mock_manifest
from tests.streams import completion
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

POLICY = {
    "pools": {"prefill": {"min": 1, "max": 2}, "decode": {"min": 1, "max": 2}},
    "scaleIn": {"hold": "Fixed", "minHoldSeconds": 0},
    "scaleToZero": {"enabled": True, "idleSeconds": 60},
}


async def ask(client: httpx.AsyncClient, service: Service, number: int) -> list[httpx.Response]:
    """One request, begun again after each refusal when Retry-After says; all of its answers.

    A router holds the requests that wake a service for a while before it refuses them.
    """
    body = {**completion(service.name, f"wake up {number}", 4), "stream": False}
    answers: list[httpx.Response] = []
    until = time.monotonic() + patience(120)
    while not answers or (answers[-1].status_code != 200 and time.monotonic() < until):
        if answers:
            await asyncio.sleep(float(answers[-1].headers["retry-after"]))
        answers.append(await client.post(f"{service.url}/v1/completions", json=body))
    return answers


async def open_loop(service: Service, requests: int, seconds: float) -> list[list[httpx.Response]]:
    """Requests at even distances that wait for nobody's answer."""
    async with httpx.AsyncClient(timeout=patience(60)) as client:
        running = []
        for number in range(requests):
            running.append(asyncio.create_task(ask(client, service, number)))
            await asyncio.sleep(seconds / requests)
        return await asyncio.gather(*running)


def test_a_service_goes_to_zero_and_back_three_times_and_answers_everything(tandem: Any) -> None:
    manifest = mock_manifest("asleep", 1, 1, autoscaling={"inline": POLICY})
    with Service.running(tandem, manifest) as service:
        for _ in range(3):
            service.wait_pool("Decode", 0, 180)
            service.wait_pool("Prefill", 0, 60)
            assert service.condition("RouterReady")["status"] == "True"
            assert service.condition("Progressing")["reason"] == "Stable"
            asked = asyncio.run(open_loop(service, 20, 10))
            refused = [answer for answers in asked for answer in answers[:-1]]
            assert {answer.status_code for answer in refused} <= {503}
            assert [answers[-1].status_code for answers in asked] == [200] * 20


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
