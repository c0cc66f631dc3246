"""The generated CRDs: up to date, deterministic, described, bounded, and true to the models."""

from pathlib import Path

import pytest
import yaml

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.api_object import ApiObject
from tandem_operator.crds.__main__ import generated_files, main
from tandem_operator.crds.kinds import INFERENCE_SERVICE, KINDS, Kind
from tandem_operator.crds.reference import render_reference
from tandem_operator.crds.render import render_chart_template, render_crd
from tandem_operator.tests.crds.crd_schema import nodes, with_defaults

ROOT = Path(__file__).resolve().parents[4]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.plural)


def arguments(folder: Path) -> list[str]:
    return [
        f"--output={folder / 'crds'}",
        f"--chart={folder / 'charts/tandem/templates/crds'}",
        f"--docs={folder / 'docs/api.md'}",
    ]


def test_the_committed_files_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(ROOT), "--check"]) == 0, capsys.readouterr().err


def test_check_names_what_is_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path)) == 0
    assert main([*arguments(tmp_path), "--check"]) == 0
    (tmp_path / "docs/api.md").write_text("old")
    (tmp_path / "crds/forgotten.yaml").write_text("{}")
    assert main([*arguments(tmp_path), "--check"]) == 1
    complaint = capsys.readouterr().err
    assert "docs/api.md is out of date" in complaint
    assert "crds/forgotten.yaml is out of date" in complaint
    assert "make gen" in complaint


def test_generating_twice_gives_the_same() -> None:
    folder = Path("x")
    assert generated_files(folder, folder / "c", folder / "d") == generated_files(
        folder, folder / "c", folder / "d"
    )


@kinds
def test_every_field_is_described(kind: Kind) -> None:
    for path, node in nodes(kind.object_schema()):
        if not path.endswith(("{}", "[]")) and path != ".metadata":
            assert node.get("description"), f"{kind.kind}{path} has no description"
            assert "\n" not in node["description"], f"{kind.kind}{path} has more than one line"


@kinds
def test_schemas_are_structural(kind: Kind) -> None:
    for path, node in nodes(kind.object_schema()):
        where = f"{kind.kind}{path}"
        assert "$ref" not in node, where
        assert "type" in node or "x-kubernetes-int-or-string" in node, where
        assert "title" not in node, where
        if node.get("type") == "array":
            assert node["x-kubernetes-list-type"] in {"map", "set", "atomic"}, where
            assert "maxItems" in node, f"{where} is unbounded: CEL would cost too much"
        if node.get("type") == "integer":
            assert {"minimum", "maximum", "format"} <= node.keys(), where
        if "additionalProperties" in node:
            assert "maxProperties" in node, where
        assert node.get("type") != "number", f"{where}: no floats"


@kinds
def test_map_keys_are_required(kind: Kind) -> None:
    for path, node in nodes(kind.object_schema()):
        for key in node.get("x-kubernetes-list-map-keys", ()):
            assert key in node["items"]["required"], f"{kind.kind}{path} {key}"


@kinds
def test_enums_are_pascal_case(kind: Kind) -> None:
    for path, node in nodes(kind.object_schema()):
        for value in node.get("enum", ()):
            assert value[0].isupper(), f"{kind.kind}{path}: {value}"
            assert value.isalnum(), f"{kind.kind}{path}: {value}"


@kinds
def test_rules_have_a_remedy_and_a_path_that_exists(kind: Kind) -> None:
    for path, node in nodes(kind.object_schema()):
        paths = {child for child, _ in nodes(node)}
        for rule in node.get("x-kubernetes-validations", ()):
            assert ":" in rule["message"], f"{kind.kind}{path}: no remedy in {rule['message']}"
            assert rule.get("fieldPath", "") in paths, f"{kind.kind}{path}: {rule['fieldPath']}"


@kinds
def test_the_schema_defaults_are_the_models(kind: Kind) -> None:
    """What the API server fills in parses to what an empty object gives in Python."""
    for part, model in (("spec", kind.spec), ("status", kind.status)):
        schema = kind.object_schema()["properties"][part]
        least = LEAST.get(model, {})
        filled = with_defaults(least, schema)
        assert model.model_validate(filled) == model.model_validate(least)


LEAST: dict[type[ApiObject], dict[str, object]] = {
    InferenceServiceSpec: {"model": {"uri": "hf://org/name"}, "prefill": {}, "decode": {}},
    KINDS[1].spec: {"serviceName": "qwen", "role": "Prefill"},
}


def test_columns_are_those_of_the_api() -> None:
    version = INFERENCE_SERVICE.to_manifest()["spec"]["versions"][0]
    shown = [c["name"] for c in version["additionalPrinterColumns"] if not c.get("priority")]
    assert [name.upper() for name in shown] == [
        "MODEL", "PREFILL", "DECODE", "RATIO", "TTFT", "TBT", "TRANSPORT", "LINK", "READY",
        "AGE",
    ]  # fmt: skip


def test_short_names_and_scale() -> None:
    manifests = {kind.kind: kind.to_manifest()["spec"] for kind in KINDS}
    short = {name: spec["names"]["shortNames"] for name, spec in manifests.items()}
    assert short == {
        "InferenceService": ["tisvc"],
        "WorkerPool": ["tpool"],
        "AutoscalingPolicy": ["tpolicy"],
    }
    scale = manifests["WorkerPool"]["versions"][0]["subresources"]["scale"]
    assert scale["specReplicasPath"] == ".spec.replicas"
    assert all("status" in spec["versions"][0]["subresources"] for spec in manifests.values())


@kinds
def test_the_chart_holds_the_same_crd(kind: Kind) -> None:
    text = render_chart_template(kind)
    plain = "\n".join(
        line for line in text.splitlines() if "{{" not in line and "helm.sh" not in line
    )
    assert yaml.safe_load(plain)["spec"] == yaml.safe_load(render_crd(kind))["spec"]
    assert "helm.sh/resource-policy: keep" in text


def test_the_reference_lists_every_field() -> None:
    page = render_reference(KINDS)
    for kind in KINDS:
        for path, _ in nodes(kind.object_schema()["properties"]["spec"], "spec"):
            if not path.endswith(("{}", "[]")) and path != "spec":
                assert f"`{path}`" in page
