"""Every file of examples/ runs to Ready, as it stands but for its model and its appetite.

The model is a mock, for weights of 72B are too large here. Requests of CPU and memory are left
out, because a small machine has no 64 GiB for each of eight workers. KV need only move, at any
speed: a mock's pages are too small to time.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import httpx
import pytest
import yaml
from deadlines import patience

from tests.service import Service, without_fabric
from tests.streams import completion

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))
# What the files expect to exist in the namespace.
SURROUNDINGS = """
apiVersion: v1
kind: Secret
metadata: {name: hf-token}
stringData: {token: hf_example}
---
apiVersion: v1
kind: Secret
metadata: {name: api-keys}
stringData: {keys: sk-example}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: models}
spec:
  accessModes: [ReadWriteMany]
  storageClassName: ""
  volumeName: $NAMESPACE
  resources: {requests: {storage: 1Gi}}
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: $NAMESPACE}
spec:
  accessModes: [ReadWriteMany]
  capacity: {storage: 1Gi}
  hostPath: {path: $FOLDER, type: DirectoryOrCreate}
"""


def on_mocks(document: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a mock for its model, a slow link, and no requests of CPU and memory."""
    if document["kind"] != "InferenceService":
        return document
    spec = document["spec"]
    if not spec["model"]["uri"].startswith("mock://"):
        spec["model"]["uri"] = "mock://tiny"
    verify = spec.setdefault("kvTransfer", {}).setdefault("verify", {})
    verify["minMegabytesPerSecond"] = 1
    without_fabric(document)
    for pool in (spec["prefill"], spec["decode"], spec.get("router", {})):
        resources = pool.get("resources", {})
        for amounts in resources.values():
            amounts.pop("cpu", None)
            amounts.pop("memory", None)
    return document


@pytest.fixture
def folder(tandem: Any, namespace: str) -> Iterator[Path]:
    """Where the volume of models lies; the volume goes with the test."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as path:
        yield Path(path)
    tandem.kubectl("delete", "pv", namespace, "--wait=false", "--ignore-not-found")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_becomes_ready_and_answers(
    tandem: Any, namespace: str, path: Path, folder: Path
) -> None:
    documents = [on_mocks(document) for document in yaml.safe_load_all(path.read_text())]
    surroundings = Template(SURROUNDINGS).substitute(NAMESPACE=namespace, FOLDER=folder)
    tandem.kubectl("apply", "-n", namespace, "-f", "-", input=surroundings)
    tandem.kubectl("apply", "-n", namespace, "-f", "-", input=yaml.safe_dump_all(documents))
    (name,) = (d["metadata"]["name"] for d in documents if d["kind"] == "InferenceService")
    service = Service(tandem, name, namespace)
    service.wait_ready(300)
    model = service.get()["spec"]["model"].get("name", name)
    reply = httpx.post(
        f"{service.url}/v1/completions",
        json={**completion(model, "to Ready", 4), "stream": False},
        headers={"Authorization": "Bearer sk-example"},
        timeout=patience(60),
    )
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == 4
