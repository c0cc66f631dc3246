"""What moves KV between two workers: shown by kubectl, held against RDMA, probed, examined."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from deadlines import patience
from typer.testing import CliRunner

from tandem_cli import main
from tests.service import Service, mock_manifest
from tests.streams import completion
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def noisy(tandem: Any) -> Iterator[Service]:
    """A service whose prefill worker changes a bit in every third write of pages."""
    faults = {"name": "TANDEM_FAULTS", "value": "pages:corrupt@1/3"}
    template = {
        "metadata": {"labels": {"tandem.dev/fault-injection": "true"}},
        "spec": {"containers": [{"name": "engine", "env": [faults]}]},
    }
    manifest = mock_manifest("noisy", decode=1)
    manifest["spec"]["prefill"]["podTemplate"] = template
    manifest["spec"]["kvTransfer"]["verify"]["mode"] = "Report"
    service = Service.apply(tandem, manifest)
    try:
        yield service
    finally:
        service.kubectl("delete", "tisvc", service.name, "--wait=false")


@pytest.fixture(scope="module")
def fallen(tandem: Any, noisy: Service) -> Iterator[Service]:
    """A service with RDMA devices in its pods whose KV goes over TCP all the same.

    It starts after the noisy one, whose pair goes out of use meanwhile.
    """
    assert noisy.get()
    manifest = mock_manifest(
        "fallen",
        decode=1,
        rdma={"mode": "DevicePlugin", "resource": {"name": "rdma/ib"}},
        kvTransfer={"backend": "Tcp"},
    )
    manifest["spec"]["kvTransfer"]["verify"] = {"mode": "Required", "minMegabytesPerSecond": 1}
    service = Service.apply(tandem, manifest)
    try:
        yield service
    finally:
        service.kubectl("delete", "tisvc", service.name, "--wait=false")


def tandem_command(service: Service, *words: str) -> Any:
    """What the command prints as JSON."""
    kubeconfig = f"--kubeconfig={service.cluster.kubeconfig}"
    done = CliRunner().invoke(main.app, [*words, kubeconfig, "-o", "json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.output)


def test_a_fall_back_is_shown_and_holds_ready_back_where_a_check_is_required(
    fallen: Service,
) -> None:
    held = "NotTransportVerified"
    wait_for("what holds it back", lambda: fallen.condition("Ready").get("reason") == held)
    verified, ready = fallen.condition("TransportVerified"), fallen.condition("Ready")
    assert verified["reason"] == "FellBackToTcp"
    assert "over Tcp" in verified["message"]
    assert ready["status"] == "False"
    assert "although RDMA is configured: check the devices in the pods" in ready["message"]
    row = fallen.kubectl("get", "tisvc", fallen.name, "--no-headers").split()
    assert row[row.index("Tcp") + 1] == "FellBackToTcp"
    (pair,) = fallen.get()["status"]["transport"]["pairs"]
    names = [pod["metadata"]["name"] for role in ("prefill", "decode") for pod in fallen.pods(role)]
    assert [pair["prefill"], pair["decode"]] == names
    assert pair["latencyMicroseconds"] > 0
    report = json.dumps({"spec": {"kvTransfer": {"verify": {"mode": "Report"}}}})
    fallen.kubectl("patch", "tisvc", fallen.name, "--type=merge", "-p", report)
    fallen.wait_ready(60)


def test_two_workers_by_name_move_kv_for_the_probe(fallen: Service) -> None:
    wait_for("both workers", lambda: len(fallen.pods("prefill") + fallen.pods("decode")) == 2)
    (sender,), (receiver,) = fallen.pod_names("prefill"), fallen.pod_names("decode")
    for one, other in ((sender, receiver), (receiver, sender)):
        words = ("probe", fallen.name, one, other, "--blocks=8")
        (answer,) = tandem_command(fallen, *words)
        assert (answer["from"], answer["to"], answer["peer"]) == (one, other, one)
        assert (answer["ok"], answer["transport"], answer["error"]) == (True, "tcp", "")
        assert min(answer["megabytesPerSecond"], answer["latencySeconds"]) > 0


def test_the_doctor_examines_each_worker_in_its_pod(fallen: Service) -> None:
    found = tandem_command(fallen, "doctor", fallen.name)
    names = [*fallen.pod_names("prefill"), *fallen.pod_names("decode")]
    assert list(found) == names
    for examined in found.values():
        checks = {(each["name"], each["subject"]): each for each in examined["checks"]}
        assert examined["node"] == "node-0"
        assert "IPC_LOCK" in checks["memlock", "this process"]["finding"]
        assert checks["shared memory", "/dev/shm"]["verdict"] in ("ok", "warn")
        assert ("library", "nixl") in checks
    (pod,) = fallen.pods("prefill")
    told = {(each["name"], each["subject"]) for each in fallen.worker_state(pod)["checks"]}
    # /state has those that are not well and matter to the worker's transport.
    assert told == {
        (each["name"], each["subject"])
        for each in found[pod["metadata"]["name"]]["checks"]
        if each["verdict"] != "ok" and (not each["matters_to"] or "tcp" in each["matters_to"])
    }


def test_a_pair_that_corrupts_kv_is_taken_out_of_use_and_named(noisy: Service) -> None:
    """Probes alone are enough for the decode worker to notice; requests are served all the time."""
    noisy.wait_ready()
    (sender,), (receiver,) = noisy.pod_names("prefill"), noisy.pod_names("decode")
    for number in range(3):
        body = {**completion(noisy.name, f"{number} and so on", 4), "stream": False}
        reply = httpx.post(f"{noisy.url}/v1/completions", json=body, timeout=patience(60))
        assert reply.json()["usage"]["completion_tokens"] == 4
    unused = wait_for(
        "the pair out of use", lambda: noisy.get()["status"]["transport"].get("outOfUse"), 120
    )
    assert [(pair["prefill"], pair["decode"]) for pair in unused] == [(sender, receiver)]
    assert "faults, the last one: " in unused[0]["because"]
    verified = noisy.condition("TransportVerified")
    assert (verified["status"], verified["reason"]) == ("False", "EveryPairOutOfUse")
    assert f"{receiver} takes no KV from {sender}" in verified["message"]
    events = noisy.kubectl("get", "events", "--field-selector", "reason=PairOutOfUse")
    assert f"{receiver} takes no KV from {sender}" in events
    assert f'kv_pair_out_of_use{{peer="{sender}"}} 1.0' in worker_metrics(noisy.pods("decode")[0])


def worker_metrics(pod: dict[str, Any]) -> str:
    """A worker's page at /metrics."""
    url = f"http://{pod['status']['podIP']}:8100/metrics"
    return httpx.get(url, timeout=patience(10)).text
