"""Every volume of a pod is mounted, and every mount is read by the container that has it."""

from typing import Any

import pytest

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.tests.api.field_effects import manifests
from tandem_operator.tests.api.field_samples import SAMPLES, put

# Used by libraries without being told: shared memory, the devices of RDMA, temporary files.
KNOWN_PATHS = {"engine": {"/dev/shm", "/dev/infiniband", "/tmp"}, "router": {"/tmp"}}
CLAIM = {"cache": {"claimName": "models"}}
KEYS = {"router": {"apiKeysSecretName": "keys"}}
BASE: dict[str, Any] = {
    "model": {"uri": "hf://org/name"},
    "prefill": {},
    "decode": {},
    "rdma": {"mode": "None"},
}
SOURCES: dict[str, set[str]] = {
    "hf://org/name": set(),
    "pvc://claim/a": {"/mnt/model"},
    "file:///models/x": {"/models/x"},
    "oci://registry/image:tag": {"/mnt/model"},
    "package://some-gguf": set(),
    "mock://fast": set(),
}
"""What a container mounts of each kind of model, beside its cache."""


def pod_specs(change: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = InferenceServiceSpec.model_validate(put(BASE, change))
    found = {}
    for child in manifests(spec):
        if child["kind"] == "Pod":
            found[child["metadata"]["name"]] = child["spec"]
        elif child["kind"] == "Deployment":
            found[child["metadata"]["name"]] = child["spec"]["template"]["spec"]
    assert len(found) == 3
    return found


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def mounted(container: dict[str, Any]) -> set[str]:
    return {mount["mountPath"] for mount in container.get("volumeMounts", [])}


def told(container: dict[str, Any]) -> str:
    """All that a container is told: its flags and its environment."""
    values = (str(item.get("value", "")) for item in container.get("env", []))
    return "\n".join([*container.get("args", []), *container.get("command", []), *values])


CASES: dict[str, dict[str, Any]] = {
    **{path: put(*change) for path, change in SAMPLES.items() if "volumes" not in path},
    **{uri: {"model": {"uri": uri, **CLAIM}, **KEYS} for uri in SOURCES},
    **{
        f"rdma {mode}": {"rdma": {"mode": mode, "resource": {"name": "rdma/ib"}}}
        for mode in ("DevicePlugin", "HostPath")
    },
    **{f"transfer {name}": {"kvTransfer": {"backend": name}} for name in ("Shm", "Tcp")},
}


@pytest.mark.parametrize("case", CASES)
def test_a_container_mounts_what_it_reads(case: str) -> None:
    for name, pod in pod_specs(CASES[case]).items():
        volumes = {volume["name"] for volume in pod["volumes"]}
        used = {m["name"] for c in containers(pod) for m in c.get("volumeMounts", [])}
        assert used == volumes, f"{name}: every volume is mounted, every mount has its volume"
        for container in containers(pod):
            unread = {
                path
                for path in mounted(container) - KNOWN_PATHS.get(container["name"], set())
                if path not in told(container)
            }
            assert not unread, f"{name}: {container['name']} is told nothing of {unread}"


@pytest.mark.parametrize("uri", SOURCES)
def test_every_container_mounts_the_model_and_a_cache(uri: str) -> None:
    pods = pod_specs({"model": {"uri": uri, **CLAIM}, **KEYS})
    files = SOURCES[uri] | {"/mnt/cache"}
    assert mounted(pods["qwen-router"]["containers"][0]) == files | {"/etc/tandem/api-keys", "/tmp"}
    for role in ("prefill", "decode"):
        assert mounted(pods[f"qwen-{role}-a"]["containers"][0]) == files | {
            *("/dev/shm", "/tmp", "/etc/tandem/admin")
        }
    for name, pod in pods.items():
        cache = next(volume for volume in pod["volumes"] if volume["name"] == "cache")
        # A router keeps nothing in the claim but what it downloads.
        shares = name != "qwen-router" or uri.startswith("hf://")
        assert ("persistentVolumeClaim" in cache) == shares, name
        security = pod["securityContext"]
        assert ("fsGroup" in security) == shares, name
        # Without it, each start walks over every file of the cache.
        assert security.get("fsGroupChangePolicy") == ("OnRootMismatch" if shares else None)


@pytest.mark.parametrize("uri", SOURCES)
def test_credentials_go_where_something_is_downloaded(uri: str) -> None:
    pods = pod_specs({"model": {"uri": uri, "secretName": "credentials"}})
    for name, pod in pods.items():
        env = {item["name"] for item in pod["containers"][0]["env"] if "valueFrom" in item}
        secret = env - {"POD_NAME", "POD_IP", "NODE_NAME"}
        assert secret == ({"HF_TOKEN"} if uri.startswith("hf://") else set()), name


def test_every_pod_gets_the_pull_secrets() -> None:
    for pod in pod_specs({}).values():
        assert "imagePullSecrets" not in pod
    change: dict[str, Any] = {"imagePullSecrets": [{"name": "registry"}]}
    for pod in pod_specs(change).values():
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
    more = {"podTemplate": {"spec": {"imagePullSecrets": [{"name": "more"}]}}}
    for part in ("prefill", "decode", "router"):
        pods = pod_specs({**change, part: more})
        name = "qwen-router" if part == "router" else f"qwen-{part}-a"
        assert pods[name]["imagePullSecrets"] == [{"name": "registry"}, {"name": "more"}]
