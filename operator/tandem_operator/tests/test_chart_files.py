"""The chart's files, as far as they can be read without helm; for the rest see e2e/tests."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem_operator.clients.children import CHILD_KINDS
from tandem_operator.clients.cluster import KINDS
from tandem_operator.crds.kinds import KINDS as CRDS

CHART = Path(__file__).resolve().parents[3] / "charts/tandem"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))


def rules() -> list[dict[str, Any]]:
    text = (CHART / "templates/_helpers.tpl").read_text()
    body = text.split('{{- define "tandem.rules" -}}')[1].split("{{- end -}}")[0]
    found: list[dict[str, Any]] = yaml.safe_load(body)
    return found


def test_the_operator_never_reads_secrets() -> None:
    for rule in rules():
        if "secrets" in rule["resources"]:
            # The answer to every other verb, even to patch and delete, shows what is in it.
            assert (rule["resources"], rule["verbs"]) == (["secrets"], ["create"])
        assert "*" not in rule["resources"] + rule["apiGroups"] + rule["verbs"]


def test_the_notes_name_every_crd() -> None:
    line = f"  kubectl delete crd {' '.join(kind.crd_name for kind in CRDS)}\n"
    assert line in (CHART / "templates/NOTES.txt").read_text()


@pytest.mark.parametrize("name", CHILD_KINDS)
def test_the_operator_may_watch_and_remove_its_children(name: str) -> None:
    kind = KINDS[name]
    (verbs,) = (
        rule["verbs"]
        for rule in rules()
        if kind.plural in rule["resources"] and kind.group in rule["apiGroups"]
    )
    assert {"get", "list", "watch", "create", "patch", "delete"} <= set(verbs)


def test_the_operator_can_grant_only_what_it_holds() -> None:
    for rule in rules():
        assert not {"bind", "escalate", "impersonate"} & set(rule["verbs"])


@pytest.mark.parametrize("path", [CHART / "values.yaml", *CI_VALUES], ids=lambda path: path.name)
def test_values_are_known_to_the_schema(path: Path) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    check_known(yaml.safe_load(path.read_text()), schema, path.name)


def check_known(values: Any, schema: dict[str, Any], where: str) -> None:
    if not isinstance(values, dict) or "properties" not in schema:
        return
    assert schema["additionalProperties"] is False
    for key, value in values.items():
        assert key in schema["properties"], f"{where}.{key} is not in values.schema.json"
        check_known(value, schema["properties"][key], f"{where}.{key}")


def test_every_schema_property_has_a_default() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(schema["properties"]) - {"global"} == set(values)


def test_every_image_can_be_pinned_and_has_a_pull_policy() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    parts = [(values["image"], schema["image"])] + [
        (image, schema["images"]["properties"][name]) for name, image in values["images"].items()
    ]
    for image, known in parts:
        assert (
            set(image) == {"repository", "tag", "digest", "pullPolicy"} == set(known["properties"])
        )
        digest = known["properties"]["digest"]["pattern"]
        assert re.search(digest, "sha256:" + "0f" * 32)
        assert not re.search(digest, "latest")
