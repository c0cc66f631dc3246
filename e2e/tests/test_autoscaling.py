"""Autoscaling: each pool follows its own load; what isn't known, isn't acted upon.

Two services share one policy; while one is measured, the other's metrics are cut off. The mock
workers' times make 2,000 tokens of prompt cost a second of prefill, and each stream 10 ms of every
decode step. The tests follow each other: the load that one raised is what the next ones see go.
"""

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from typing import Any

import pytest

from tests.service import Service, mock_manifest
from tests.streams import Stream, completion, run_streams
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

POLICY = {
    "apiVersion": "tandem.dev/v1alpha1",
    "kind": "AutoscalingPolicy",
    "metadata": {"name": "follow"},
    "spec": {
        "objectives": {"ttftMilliseconds": 2500, "tbtMilliseconds": 150, "percentile": 90},
        "signals": {"staleSeconds": 8},
        "pools": {"prefill": {"min": 1, "max": 3}, "decode": {"min": 1, "max": 3}},
        "scaleIn": {"hold": "Fixed", "minHoldSeconds": 5},
    },
}
PROFILE = (
    "tiny?blocks=4096&prefill_base=0.005&prefill_per_token=0.0005"
    "&decode_base=0.02&decode_per_sequence=0.01"
)
WINDOW_SECONDS = 30.0  # how far back the operator's measurements go
NUMBERS = count()


def apply_policy(cluster: Any, mode: str) -> None:
    manifest = {**POLICY, "spec": {**POLICY["spec"], "mode": mode}}  # type: ignore[dict-item]
    cluster.kubectl("apply", "-n", "default", "-f", "-", input=json.dumps(manifest))


def start(cluster: Any, name: str) -> Service:
    manifest = mock_manifest(
        name,
        prefill=1,
        decode=1,
        profile=PROFILE,
        autoscaling={"policyName": "follow"},
    )
    manifest["spec"]["prefill"]["maxBatchedTokens"] = 2048
    return Service.apply(cluster, manifest)


@pytest.fixture(scope="module")
def services(tandem: Any) -> Iterator[tuple[Service, Service]]:
    apply_policy(tandem, "Active")
    both = start(tandem, "prompts"), start(tandem, "outputs")
    for service in both:
        service.wait_ready(240)
    yield both
    tandem.kubectl("delete", "-n", "default", "tisvc", "prompts", "outputs", "--wait=false")
    for service in both:
        service.delete()
    tandem.kubectl("delete", "-n", "default", "tpolicy", "follow")


@pytest.fixture
def prompts(services: tuple[Service, Service]) -> Service:
    return services[0]


@pytest.fixture
def outputs(services: tuple[Service, Service]) -> Service:
    return services[1]


@contextmanager
def load(service: Service, streams: int, prompt_tokens: int, max_tokens: int) -> Iterator[None]:
    """Keep this many streams running, each with a new prompt; all must end well."""
    stop = threading.Event()
    seen: list[Stream] = []
    url = service.url

    def client() -> None:
        while not stop.is_set():
            prompt = f"{next(NUMBERS):08d}".ljust(prompt_tokens, ".")
            body = completion(service.name, prompt, max_tokens)
            seen.extend(asyncio.run(run_streams(url, [body])))

    threads = [threading.Thread(target=client) for _ in range(streams)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert seen
    assert [stream.error for stream in seen if stream.error] == []


def decisions(service: Service) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service.get().get("status", {}).get("scaling", [])
    return found


def grown(service: Service, how: str = "Start") -> set[str]:
    """The pools that the policy has recently raised, or advised to raise."""
    taken = (item for item in decisions(service) if item["how"] == how)
    return {item["pool"] for item in taken if item["to"] > item["from"]}


def slowest_ttft(service: Service) -> int:
    """The milliseconds to the first token, from status; 0 before the first measurement."""
    slo: dict[str, int] = service.get()["status"].get("slo") or {}
    return slo.get("ttftMilliseconds") or 0


def is_stale(service: Service) -> bool:
    return bool(service.condition("MetricsStale").get("status") == "True")


def stale_seconds(service: Service) -> float:
    """How long the metrics have been stale. Raises AssertionError if they are not."""
    condition = service.condition("MetricsStale")
    assert condition["status"] == "True"
    since = datetime.fromisoformat(condition["lastTransitionTime"])
    return (datetime.now(UTC) - since).total_seconds()


@contextmanager
def stopped_router(service: Service) -> Iterator[None]:
    """The service's only router neither answers nor ends."""
    pids = service.cluster.container_pids(service.namespace, service.pod_names("router")[0])
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_long_prompts_raise_prefill_alone(prompts: Service) -> None:
    with load(prompts, streams=6, prompt_tokens=2000, max_tokens=4):
        wait_for("prefill grows", lambda: prompts.pool("Prefill")["ready"] >= 2, 120)
        wait_for("status shows the slow TTFT", lambda: slowest_ttft(prompts) > 1000, 60)
    assert grown(prompts) == {"Prefill"}
    assert prompts.pool("Decode")["desired"] == 1
    newest = decisions(prompts)[0]
    assert newest["because"]

    def told() -> bool:
        events = json.loads(prompts.kubectl("get", "events", "-o", "json"))["items"]
        messages = (item["message"] for item in events if item["reason"] == "ScalingDecided")
        return any(newest["because"] in message for message in messages)

    wait_for("the decision is an event", told, 30)


def test_long_outputs_raise_decode_alone(outputs: Service, prompts: Service) -> None:
    with stopped_router(prompts), load(outputs, streams=24, prompt_tokens=24, max_tokens=60):
        wait_for("the metrics are stale", lambda: is_stale(prompts), 60)
        held = prompts.pool("Prefill")
        wait_for("decode grows", lambda: outputs.pool("Decode")["ready"] >= 2, 150)
        # Without load and with metrics, prefill would have shrunk in this time.
        wait_for("that lasts", lambda: stale_seconds(prompts) > WINDOW_SECONDS, 90)
        assert held["desired"] >= 2
        assert prompts.pool("Prefill") == held
        active = prompts.condition("ScalingActive")
        assert (active["status"], active["reason"]) == ("False", "MetricsStale")
        assert {item["how"] for item in decisions(prompts)} == {"Start"}
    assert grown(outputs) == {"Decode"}
    assert outputs.pool("Prefill")["desired"] == 1
    assert "TBT" in decisions(outputs)[-1]["because"]
    wait_for("the metrics are fresh again", lambda: not is_stale(prompts), 60)


def test_a_write_to_scale_waits_while_the_policy_is_active(outputs: Service) -> None:
    outputs.kubectl("scale", "tpool/outputs-prefill", "--replicas=2")
    ignored = wait_for(
        "the write is shown as ignored", lambda: outputs.pool("Prefill").get("ignoredReplicas"), 60
    )
    assert ignored == 2
    assert outputs.pool("Prefill")["desired"] == 1
    notes = outputs.get("tpool", "outputs-prefill")["metadata"]["annotations"]
    assert notes["tandem.dev/ignored-scale"].startswith("2: an autoscaling policy is active")


def test_little_load_brings_both_pools_to_their_minimum(prompts: Service, outputs: Service) -> None:
    crowds: set[int] = set()

    def at_minimum() -> bool:
        pods = [pod for service in (prompts, outputs) for pod in service.pods()]
        for service in (prompts, outputs):
            draining = [
                pod
                for pod in pods
                if pod["metadata"]["labels"]["tandem.dev/service"] == service.name
                and "tandem.dev/draining" in pod["metadata"].get("annotations", {})
                and not pod["metadata"].get("deletionTimestamp")
            ]
            crowds.add(len(draining))
        roles = [pod["metadata"]["labels"]["tandem.dev/role"] for pod in pods]
        return roles.count("prefill") == 2 and roles.count("decode") == 2

    with load(outputs, streams=1, prompt_tokens=24, max_tokens=20):
        wait_for("one worker of each is left", at_minimum, 180)
    assert max(crowds) == 1
    for service in (prompts, outputs):
        assert "Drain" in {item["how"] for item in decisions(service)}
        assert set(service.leaked_blocks().values()) == {0}
        assert service.get()["status"].get("failures", []) == []


def test_advisory_only_says_so(outputs: Service) -> None:
    apply_policy(outputs.cluster, "Advisory")
    # The earlier write takes effect now, and nothing else changes anything.
    outputs.wait_pool("Prefill", 2)
    assert outputs.pool("Prefill")["scaledBy"] == "External"
    with load(outputs, streams=24, prompt_tokens=24, max_tokens=60):
        wait_for("more decode is advised", lambda: "Decode" in grown(outputs, "Advised"), 120)
    active = outputs.condition("ScalingActive")
    assert (active["status"], active["reason"]) == ("False", "Advisory")
    assert outputs.pool("Decode")["desired"] == 1
    assert len(outputs.pods("decode")) == 1
    target = next(
        item
        for item in outputs.get("tpolicy", "follow")["status"]["targets"]
        if item["name"] == "outputs"
    )
    assert target["lastDecision"]
