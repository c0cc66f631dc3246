"""Commands and manifests of the pages, as the real helm, kubectl and API server take them."""

import shlex
from typing import Any

import pytest
import yaml

from tests.chart import CHART, helm, kubectl
from tests.pages import blocks, commands

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

FOREIGN = {"HTTPRoute"}
"""Kinds whose CRDs the test cluster doesn't have."""


def starting(*words: str) -> list[str]:
    found = dict.fromkeys(text for _, text in commands() if text.startswith(words))
    assert found
    return list(found)


@pytest.mark.parametrize("command", starting("helm install", "helm upgrade"))
def test_helm_takes_a_command(command: str) -> None:
    words = shlex.split(command)
    assert "charts/tandem" in words
    others = words[words.index("charts/tandem") + 1 :]
    done = helm("template", "tandem", str(CHART), *others)
    assert done.returncode == 0, done.stderr
    for word in others:
        name, _, value = word.partition("=")
        if name.endswith((".repository", ".tag")):
            assert value in done.stdout


@pytest.mark.parametrize("command", starting("kubectl create"))
def test_kubectl_makes_what_a_command_says(command: str) -> None:
    done = kubectl(*shlex.split(command)[1:], "--dry-run=client", "-o", "yaml")
    assert done.returncode == 0, done.stderr
    made = yaml.safe_load(done.stdout)
    assert made["kind"] in ("Secret", "Namespace")


def test_the_api_server_takes_every_manifest(tandem: Any) -> None:
    taken = 0
    for block in blocks("yaml"):
        for number, document in enumerate(yaml.safe_load_all(block.text)):
            if "kind" not in document or document["kind"] in FOREIGN:
                continue
            document["metadata"]["namespace"] = "default"
            text = yaml.safe_dump(document)
            done = tandem.kubectl(
                "create", "--dry-run=server", "--validate=strict", "-f", "-", input=text,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{block.where} ({number}): {done.stderr}"
            taken += 1
    assert taken > 5
