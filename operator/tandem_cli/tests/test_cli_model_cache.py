"""The volume in which pods of the embedded cluster keep converted models."""

import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem_cli.model_cache import CACHE_NAME, use_cache
from tandem_operator.api import InferenceServiceSpec

QUICKSTART = Path(__file__).resolve().parents[3] / "examples/quickstart.yaml"


def test_the_quickstart_gets_a_volume_that_every_user_can_write(tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all(QUICKSTART.read_text()))
    folder = tmp_path / "pods" / "models"
    volume, claim, service = use_cache(documents, folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777
    assert volume["spec"]["hostPath"]["path"] == str(folder)
    assert volume["spec"]["claimRef"] == {"namespace": "default", "name": CACHE_NAME}
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert claim["metadata"] == {"name": CACHE_NAME, "namespace": "default"}
    spec = InferenceServiceSpec.model_validate(service["spec"])
    assert spec.model.cache.claim_name == CACHE_NAME
    assert "cache" not in documents[0]["spec"]["model"]


@pytest.mark.parametrize(
    "model",
    [
        {"uri": "mock://fast"},
        {"uri": "package://x", "cache": {"claimName": "mine"}},
    ],
    ids=["no files", "a claim of its own"],
)
def test_others_are_left_as_they_are(tmp_path: Path, model: dict[str, Any]) -> None:
    service = {
        "kind": "InferenceService",
        "metadata": {"name": "x", "namespace": "team"},
        "spec": {"model": model},
    }
    documents = [{"kind": "Secret", "metadata": {"name": "s"}}, service]
    assert use_cache(documents, tmp_path / "models") == documents
    assert not (tmp_path / "models").exists()


def test_each_namespace_has_a_claim(tmp_path: Path) -> None:
    services = [
        {
            "kind": "InferenceService",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"model": {"uri": "package://x"}},
        }
        for name, namespace in (("x", "a"), ("y", "a"), ("z", "b"))
    ]
    kinds = [(d["kind"], d["metadata"].get("namespace")) for d in use_cache(services, tmp_path)]
    assert kinds[:4] == [
        *(("PersistentVolume", None), ("PersistentVolumeClaim", "a")),
        *(("PersistentVolume", None), ("PersistentVolumeClaim", "b")),
    ]
