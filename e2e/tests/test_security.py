"""Who can do what: secrets stay secret, keys can be rotated, drains are the operator's alone."""

import base64
import json
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from deadlines import patience

from tests.service import Service, is_ready, mock_manifest
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SYSTEM = "tandem-system"
KEYS = "safe-keys"
OLD, NEW = f"old-{uuid.uuid4().hex}", f"new-{uuid.uuid4().hex}"
# The kubelet looks for a change of a mounted Secret once a minute.
REMOUNT_SECONDS = 180


@pytest.fixture(scope="module")
def safe(tandem: Any) -> Iterator[Service]:
    put_keys(tandem, first=OLD)
    manifest = mock_manifest("safe", decode=2, router={"apiKeysSecretName": KEYS})
    with Service.running(tandem, manifest) as service:
        yield service
    tandem.kubectl("delete", "secret", KEYS, "--wait=false")


def put_keys(tandem: Any, **keys: str) -> None:
    meta = {"name": KEYS, "namespace": "default"}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": keys}
    # Not `apply`: that keeps entries which were written in another way.
    found = tandem.kubectl("get", "secret", KEYS, "-n", "default", check=False)
    verb = "replace" if found.returncode == 0 else "create"
    tandem.kubectl(verb, "-f", "-", input=json.dumps(secret))


def token_of(service: Service) -> str:
    """The admin token, which the test reads as the cluster's administrator."""
    (volume,) = (
        volume
        for volume in service.pods("decode")[0]["spec"]["volumes"]
        if volume["name"] == "admin-token"
    )
    secret = service.get("secret", volume["secret"]["secretName"])
    return base64.b64decode(secret["data"]["token"]).decode()


def drain(pod: dict[str, Any], token: str = "") -> int:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    url = f"http://{pod['status']['podIP']}:8100/admin/drain"
    return httpx.post(url, json={}, headers=headers, timeout=patience(20)).status_code


def ask(service: Service, key: str) -> int:
    body = {"model": service.name, "prompt": "hi", "max_tokens": 2}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    url = f"{service.url}/v1/completions"
    return httpx.post(url, json=body, headers=headers, timeout=patience(30)).status_code


@pytest.fixture(scope="module")
def viewer(tandem: Any) -> Iterator[str]:
    """A user with the built-in role `view`."""
    name = f"viewer-{uuid.uuid4().hex[:8]}"
    tandem.kubectl("create", "clusterrolebinding", name, "--clusterrole=view", f"--user={name}")
    yield name
    tandem.kubectl("delete", "clusterrolebinding", name)


def test_whoever_may_view_sees_no_secret_and_drains_nothing(
    tandem: Any, safe: Service, viewer: str
) -> None:
    token = token_of(safe)
    kinds = tandem.kubectl("api-resources", "--namespaced", "--verbs=list", "-o", "name").stdout
    seen = {}
    for kind in kinds.split():
        done = tandem.kubectl("get", kind, "-A", "-o", "json", f"--as={viewer}", check=False)
        if done.returncode == 0:
            seen[kind] = done.stdout
    assert "secrets" not in seen
    assert {"pods", "events", "inferenceservices.tandem.dev", "deployments.apps"} <= set(seen)
    assert safe.name in seen["pods"]
    for pod in json.loads(seen["pods"])["items"]:
        meta = pod["metadata"]
        log = ("logs", "-n", meta["namespace"], meta["name"], "--all-containers")
        seen[meta["name"]] = tandem.kubectl(*log, f"--as={viewer}", check=False).stdout
    for secret in (token, OLD):
        assert not [name for name, text in seen.items() if secret in text]
    worker = safe.pods("decode")[0]
    assert drain(worker) == 401
    assert drain(worker, "guess") == 401
    assert not safe.worker_state(worker)["draining"]


def test_a_worker_that_somebody_drained_by_hand_works_again(safe: Service) -> None:
    worker = safe.pods("decode")[0]
    assert drain(worker, token_of(safe)) == 200
    assert safe.worker_state(worker)["draining"]
    wait_for("the worker works again", lambda: not safe.worker_state(worker)["draining"], 60)
    safe.wait_pool("Decode", 2)
    assert worker["metadata"]["uid"] in {pod["metadata"]["uid"] for pod in safe.pods("decode")}
    events = json.loads(safe.kubectl("get", "events.events.k8s.io", "-o", "json"))["items"]
    told = [event["note"] for event in events if event["reason"] == "DrainUndone"]
    assert any(worker["metadata"]["name"] in note for note in told)


def test_a_rotated_key_needs_no_restart_and_refuses_nobody(tandem: Any, safe: Service) -> None:
    routers = {pod["metadata"]["uid"] for pod in safe.pods("router")}
    assert (ask(safe, OLD), ask(safe, NEW), ask(safe, "")) == (200, 401, 401)
    valid, answers, done = [OLD], [], threading.Event()

    def client() -> None:
        while not done.is_set():
            answers.append(ask(safe, valid[-1]))

    thread = threading.Thread(target=client)
    thread.start()
    try:
        put_keys(tandem, first=OLD, second=NEW)
        wait_for("the new key is accepted", lambda: ask(safe, NEW) == 200, REMOUNT_SECONDS)
        valid.append(NEW)
        before = len(answers)
        wait_for("the client has changed over", lambda: len(answers) > before + 2, 60)
        put_keys(tandem, second=NEW)
        wait_for("the old key is refused", lambda: ask(safe, OLD) == 401, REMOUNT_SECONDS)
        assert ask(safe, NEW) == 200
    finally:
        done.set()
        thread.join(patience(60))
    assert set(answers) == {200}
    pods = safe.pods("router")
    assert {pod["metadata"]["uid"] for pod in pods} == routers
    assert {pod["status"]["containerStatuses"][0]["restartCount"] for pod in pods} == {0}


def test_clients_see_neither_metrics_nor_state(safe: Service) -> None:
    for path in ("/metrics", "/state"):
        answer = httpx.get(safe.url + path, headers={"authorization": f"Bearer {NEW}"})
        assert answer.status_code == 404
    assert "tandem_requests_total" in safe.router_metrics()


def test_every_container_of_ours_has_few_rights_and_a_read_only_root(
    tandem: Any, safe: Service
) -> None:
    """The operator's, the routers' and the workers' as the API server has them."""
    pods = json.loads(tandem.kubectl("get", "pods", "-n", SYSTEM, "-o", "json").stdout)["items"]
    pods += safe.pods()
    seen = set()
    for pod in pods:
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            name, security = container["name"], container["securityContext"]
            seen.add(name)
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
            literal = {env["name"] for env in container.get("env", []) if "value" in env}
            assert not [e for e in literal if "TOKEN" in e or "KEY" in e or "SECRET" in e]
    assert seen == {"operator", "router", "engine"}


def test_a_namespace_with_a_quota_is_enough(tandem: Any) -> None:
    """A quota on requests and limits refuses every container that says none."""
    name = f"quota-{uuid.uuid4().hex[:8]}"
    hard = {f"{kind}.{what}": "64Gi" for kind in ("requests", "limits") for what in ("memory",)}
    hard |= {"requests.cpu": "32", "limits.cpu": "64"}
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "all", "namespace": name},
        "spec": {"hard": hard},
    }
    pool = {"resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}
    pool["resources"]["requests"] = {"cpu": "100m", "memory": "256Mi"}
    tandem.kubectl("create", "namespace", name)
    try:
        tandem.kubectl("create", "-f", "-", input=json.dumps(quota))
        manifest = mock_manifest(
            "bounded",
            decode=1,
            rdma={"mode": "DevicePlugin"},
        )
        for role in ("prefill", "decode"):
            manifest["spec"][role] |= pool
        service = Service.apply(tandem, manifest, name).wait_ready(240)
        names = {
            container["name"]
            for pod in service.pods()
            for container in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"])
        }
        assert names == {"router", "engine", "memlock"}
        assert all(is_ready(pod) for pod in service.pods())
        service.delete()
    finally:
        tandem.kubectl("delete", "namespace", name, "--wait=false")
