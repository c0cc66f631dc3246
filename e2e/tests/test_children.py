"""What the operator writes for a service: nothing at rest, repairs, removals, refusals by field."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from deadlines import patience

from tests.service import Service, is_ready, mock_manifest
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NUM_PASSES = 5
"""A service at rest has a pass every 15 seconds or so."""
REQUESTS = re.compile(r"^apiserver_request_total\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
OURS = {
    "inferenceservices", "workerpools", "deployments", "services", "serviceaccounts", "roles",
    "rolebindings", "networkpolicies", "poddisruptionbudgets",
}  # fmt: skip
# Only the operator applies, and only it writes its own kinds.
WRITES = {"APPLY", "POST", "PATCH", "PUT", "DELETE"}
READS = {"GET", "LIST"}


@pytest.fixture(scope="module")
def resting(tandem: Any) -> Iterator[Service]:
    manifest = mock_manifest("resting", decode=1)
    del manifest["spec"]["router"]["replicas"]
    with Service.running(tandem, manifest) as service:
        yield service


def requests(service: Service) -> Counter[tuple[str, str]]:
    """Requests to the API server so far, by verb and resource."""
    found: Counter[tuple[str, str]] = Counter()
    for labels, value in REQUESTS.findall(service.kubectl("get", "--raw", "/metrics")):
        told = dict(LABEL.findall(labels))
        found[(told["verb"], told["resource"])] += int(float(value))
    return found


def passes(service: Service) -> int:
    """The passes over the service, from the operator's own metrics."""
    pods = json.loads(
        service.cluster.kubectl(
            *("get", "pods", "-n", "tandem-system", "-o", "json"),
            *("-l", "app.kubernetes.io/name=tandem-operator"),
        ).stdout
    )["items"]
    total = 0
    for pod in pods:
        url = f"http://{pod['status']['podIP']}:9090/metrics"
        text = httpx.get(url, timeout=patience(10)).text
        name = rf'service="{service.name}"'
        counts = re.findall(
            rf"^tandem_operator_reconcile_seconds_count\{{.*{name}.*\}} (\S+)$", text, re.MULTILINE
        )
        total += sum(int(float(count)) for count in counts)
    return total


def more_passes(service: Service, number: int = 2) -> None:
    """Cause passes, one after the other."""
    for _ in range(number):
        one_pass(service)


def one_pass(service: Service) -> None:
    first = passes(service)
    service.kubectl("annotate", "tisvc", service.name, f"test/pass={first}", "--overwrite")
    wait_for("the operator passes", lambda: passes(service) > first)


def still(service: Service) -> Callable[[], bool]:
    """Whether some passes in a row have left the service as it is."""
    seen: dict[str, int] = {}

    def probe() -> bool:
        version, made = int(service.get()["metadata"]["resourceVersion"]), passes(service)
        if seen.get("version") != version:
            seen.update(version=version, since=made)
        return made - seen["since"] >= 3

    return probe


def patch(service: Service, body: dict[str, Any], kind: str = "tisvc", name: str = "") -> None:
    target = (kind, name or service.name)
    service.kubectl("patch", *target, "--type=merge", "-p", json.dumps(body))


def test_at_rest_nothing_is_written(resting: Service) -> None:
    wait_for("its status stands still", still(resting), 300)
    before, first = requests(resting), passes(resting)
    wait_for("the service rests", lambda: passes(resting) >= first + NUM_PASSES, 30 * NUM_PASSES)
    after, made = requests(resting), passes(resting) - first
    grown = {key: number for key, number in (after - before).items() if key[1] in OURS}
    writes = {key: number for key, number in grown.items() if key[0] in WRITES}
    num_reads = sum(number for key, number in grown.items() if key[0] in READS)
    print(f"{made} passes at rest: {sum(writes.values())} writes {writes}, {num_reads} reads")
    assert sum(writes.values()) == 0, writes


def test_drift_is_undone(resting: Service) -> None:
    name = resting.name
    service = resting.get("service")
    patch(resting, {"spec": {"selector": {"app": "theirs"}}}, "service")
    no_label = {"metadata": {"labels": {"tandem.dev/service": None}}}
    patch(resting, no_label, "service", f"{name}-worker")
    patch(resting, {"rules": []}, "role", f"{name}-router")
    patch(resting, {"spec": {"maxUnavailable": 2}}, "pdb", f"{name}-router")
    uid = resting.get("networkpolicy", f"{name}-worker")["metadata"]["uid"]
    resting.kubectl("delete", "networkpolicy", f"{name}-worker")

    def undone() -> bool:
        labels = resting.get("service", f"{name}-worker")["metadata"].get("labels", {})
        policy = resting.get("networkpolicy", f"{name}-worker")
        return (
            "app" not in resting.get("service")["spec"]["selector"]
            and labels.get("tandem.dev/service") == name
            and bool(resting.get("role", f"{name}-router")["rules"])
            and resting.get("pdb", f"{name}-router")["spec"]["maxUnavailable"] == 1
            and bool(policy)
            and policy["metadata"]["uid"] != uid
        )

    wait_for("all of it is undone", undone, 20)
    assert resting.get("service")["metadata"]["uid"] == service["metadata"]["uid"]


def test_policies_go_when_they_are_switched_off(resting: Service) -> None:
    def names() -> set[str]:
        found = resting.kubectl(
            *("get", "networkpolicy", "-l", f"tandem.dev/service={resting.name}"), "-o", "name"
        )
        return {line.rpartition("/")[2] for line in found.split()}

    both = {"resting-router", "resting-worker"}
    assert names() == both
    patch(resting, {"spec": {"networkPolicy": {"enabled": False}}})
    wait_for("they are gone", lambda: not names(), 20)
    patch(resting, {"spec": {"networkPolicy": {"enabled": True}}})
    wait_for("they are back", lambda: names() == both, 20)
    resting.wait_ready()


def test_a_scaler_keeps_the_number_of_routers(resting: Service) -> None:
    def routers() -> dict[str, Any]:
        return resting.get("deployment", "resting-router")

    assert routers()["spec"]["replicas"] == 2
    resting.kubectl("scale", "deployment/resting-router", "--replicas=3")
    more_passes(resting)
    assert routers()["spec"]["replicas"] == 3
    # The operator applies the Deployment, and leaves the number alone.
    patch(resting, {"spec": {"router": {"policy": "RoundRobin"}}})
    wait_for(
        "the new template is there",
        lambda: "RoundRobin" in routers()["spec"]["template"]["spec"]["containers"][0]["args"],
    )
    assert routers()["spec"]["replicas"] == 3
    patch(resting, {"spec": {"router": {"replicas": 1}}})
    wait_for("the spec rules", lambda: routers()["spec"]["replicas"] == 1)
    resting.kubectl("scale", "deployment/resting-router", "--replicas=4")
    wait_for("the spec rules still", lambda: routers()["spec"]["replicas"] == 1, 20)
    patch(resting, {"spec": {"router": {"replicas": None}}})
    more_passes(resting)
    assert routers()["spec"]["replicas"] == 1
    resting.kubectl("scale", "deployment/resting-router", "--replicas=2")
    more_passes(resting)
    assert routers()["spec"]["replicas"] == 2
    resting.wait_ready()


@pytest.mark.parametrize(
    ("part", "ready", "template", "path"),
    [
        ("decode", "DecodeReady", {"tolerationz": []}, "spec.tolerationz"),
        (
            "router",
            "RouterReady",
            {"containers": [{"name": "side", "image": "x", "imagePullPolicyy": "Never"}]},
            "spec.containers[0].imagePullPolicyy",
        ),
        (
            "router",
            "RouterReady",
            {"tolerations": [{"operator": "Exists", "effect": "x"}]},
            "spec.tolerations[0].effect",
        ),
    ],
)
def test_an_unknown_field_of_a_template_is_named(
    tandem: Any, part: str, ready: str, template: dict[str, Any], path: str
) -> None:
    manifest = mock_manifest("typing", decode=1)
    manifest["spec"][part]["podTemplate"] = {"spec": template}
    service = Service.apply(tandem, manifest)
    try:
        wait_for(
            "the field is told",
            lambda: all(
                service.condition(kind).get("reason") == "FieldRefused"
                for kind in ("Degraded", ready)
            ),
        )
        said = service.condition("Degraded")["message"]
        print(said)
        assert f"spec.{part}.podTemplate.{path}: " in said
        patch(service, {"spec": {part: {"podTemplate": None}}})
        service.wait_ready()
    finally:
        service.kubectl("delete", "tisvc", "typing", "--wait=false")
        service.delete()


def test_a_template_takes_away_with_kubectl_apply(tandem: Any) -> None:
    """kubectl apply drops nulls, `$patch: delete` stays."""
    probes = {"name": "engine", "livenessProbe": {"$patch": "delete"}}
    manifest = mock_manifest("taking", decode=1)
    with Service.running(tandem, manifest) as service:
        assert "livenessProbe" in service.pods("decode")[0]["spec"]["containers"][0]
        manifest["spec"]["decode"]["podTemplate"] = {"spec": {"containers": [probes]}}
        Service.apply(tandem, manifest)

        def taken() -> bool:
            pods = service.pods("decode")
            return len(pods) == 1 and "livenessProbe" not in pods[0]["spec"]["containers"][0]

        wait_for("the probe is gone", taken, 120)
        service.wait_ready()


def test_a_roll_out_that_fails_keeps_its_old_revision_without_any_pod(tandem: Any) -> None:
    with Service.running(tandem, mock_manifest("recorded", decode=1)) as service:
        old = service.get()["status"]["revision"]
        assert service.get("controllerrevision", f"recorded-{old}")["data"]["decode"]
        patch(service, {"spec": {"engine": {"image": "ghcr.io/nobody/nothing:1"}}})
        wait_for("the roll-out begins", lambda: service.get()["status"].get("updatedRevision"))
        role = "tandem.dev/role in (prefill,decode)"
        service.kubectl(
            *("delete", "pods", "-l", f"tandem.dev/service=recorded,{role}"),
            *("--grace-period=0", "--force"),
        )

        def serves() -> bool:
            pods = [pod for pod in service.pods("decode") if is_ready(pod)]
            return [pod["metadata"]["labels"]["tandem.dev/revision"] for pod in pods] == [old]

        wait_for("a decode worker of the old revision is ready", serves, 120)
        reply = httpx.post(
            f"{service.url}/v1/completions",
            json={"model": "recorded", "prompt": "hello", "max_tokens": 4},
            timeout=patience(30),
        )
        assert reply.status_code == 200, reply.text
