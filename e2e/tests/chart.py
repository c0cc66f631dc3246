"""The chart as the real helm renders it, which takes neither a cluster nor an operator."""

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import yaml

from tandem_local.binaries.build import find_binaries
from tandem_local.client import Commands

CHART = Path(__file__).resolve().parents[2] / "charts/tandem"
NAMESPACE = "tandem-system"
Document = dict[str, Any]


def helm(*arguments: str) -> CompletedProcess[str]:
    """The real helm, which `tandem cluster build` has built; a failure is an answer too."""
    return _commands().helm(*arguments, check=False)


def kubectl(*arguments: str) -> CompletedProcess[str]:
    """The real kubectl, for what it does without a cluster."""
    return _commands().kubectl(*arguments, check=False)


def _commands() -> Commands:
    binary = str(find_binaries().cluster)
    return Commands(Path("/dev/null"), [binary, "kubectl"], [binary, "helm"])


def render(
    values: dict[str, Any] | None = None, release: str = "tandem", namespace: str = NAMESPACE
) -> list[Document]:
    """The manifests for these values, the CRDs among them. AssertionError when helm refuses."""
    given = [f"--set-json={key}={json.dumps(value)}" for key, value in (values or {}).items()]
    done = helm("template", release, str(CHART), "-n", namespace, *given)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def refusal(values: dict[str, Any]) -> str:
    """What helm says about values that it must refuse."""
    given = [f"--set-json={key}={json.dumps(value)}" for key, value in values.items()]
    done = helm("template", "tandem", str(CHART), "-n", NAMESPACE, *given)
    assert done.returncode, f"{values} are accepted"
    return done.stderr


def key_of(document: Document) -> tuple[str, str, str]:
    """What no two objects of a cluster share."""
    metadata = document["metadata"]
    return document["kind"], metadata.get("namespace", ""), metadata["name"]


def container(documents: list[Document]) -> Document:
    """The operator's container."""
    (deployment,) = (each for each in documents if each["kind"] == "Deployment")
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    found: Document = only
    return found
