"""What the API server refuses and accepts: the CRDs' rules, tried with kubectl on a real one."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem_operator.tests.bad_manifest import BAD_MANIFESTS, BadManifest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))
POOL = """
apiVersion: tandem.dev/v1alpha1
kind: WorkerPool
metadata: {name: admission-prefill}
spec: {serviceName: admission, role: Prefill}
"""


@pytest.mark.parametrize("bad", BAD_MANIFESTS, ids=lambda bad: bad.name)
def test_bad_manifests_are_refused(tandem: Any, bad: BadManifest) -> None:
    done = tandem.kubectl("apply", "-f", "-", check=False, input=yaml.safe_dump(bad.manifest))
    assert done.returncode != 0, f"taken, although: {bad.what}"
    assert bad.field in done.stderr
    assert bad.message in done.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_taken(tandem: Any, path: Path) -> None:
    tandem.kubectl("apply", "--dry-run=server", "-f", str(path))


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ('{"spec":{"role":"Decode"}}', "spec.role can't be changed: delete the pool"),
        ('{"spec":{"serviceName":"other"}}', "spec.serviceName can't be changed: delete the pool"),
    ],
)
def test_pools_keep_their_identity(tandem: Any, patch: str, words: str) -> None:
    # The operator removes a pool without a service, so each attempt creates its own.
    tandem.kubectl("apply", "-f", "-", input=POOL)
    try:
        done = tandem.kubectl(
            *("patch", "tpool", "admission-prefill", "--type=merge", "--dry-run=server"),
            *("-p", patch),
            check=False,
        )
        assert done.returncode != 0
        assert words in done.stderr
    finally:
        tandem.kubectl("delete", "tpool", "admission-prefill", "--ignore-not-found")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("tisvc.spec.kvTransfer", "An uncached suffix no longer than this"),
        ("tisvc.spec.prefill.podTemplate", "node selector, tolerations, sidecars"),
        ("tisvc.spec.engine.options", "Memory of the KV cache per worker"),
        ("tpool.spec.replicas", "kubectl scale"),
        ("tpolicy.spec.coordination", "GPUs that both pools together may use"),
    ],
)
def test_explain_explains(tandem: Any, field: str, words: str) -> None:
    assert words in " ".join(tandem.kubectl("explain", field).stdout.split())


def test_faults_are_taken_when_the_pods_of_both_pools_are_labelled(tandem: Any) -> None:
    (refused,) = (bad for bad in BAD_MANIFESTS if bad.name == "faults-without-label")
    manifest = deepcopy(refused.manifest)
    manifest["spec"]["decode"]["podTemplate"] = manifest["spec"]["prefill"]["podTemplate"]
    tandem.kubectl("apply", "--dry-run=server", "-f", "-", input=yaml.safe_dump(manifest))
