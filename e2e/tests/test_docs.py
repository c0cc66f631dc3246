"""What the pages say, held against what exists: links, fields, values of the chart, commands."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from tandem_cli.main import app
from tandem_operator.api import AutoscalingPolicySpec, InferenceServiceSpec
from tandem_operator.crds.kinds import KINDS
from tests.pages import PAGES, RECORDS, ROOT, anchors, blocks, commands, links, prose

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
VALUES = json.loads((ROOT / "charts/tandem/values.schema.json").read_text())
FILES = (".py", ".md", ".json", ".yaml", ".toml", ".go", ".txt", ".tpl")
SPECS: dict[str, type[BaseModel]] = {
    "InferenceService": InferenceServiceSpec,
    "AutoscalingPolicy": AutoscalingPolicySpec,
}
MINIMAL = {"model": {"uri": "hf://org/name"}, "prefill": {}, "decode": {}}


PARTS = [kind.marked_schema()["properties"] for kind in KINDS]


def test_links_lead_somewhere() -> None:
    wrong = []
    for page in (*PAGES, *RECORDS):
        for link in links(page):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                wrong.append(f"{page.name}: {link}")
    assert wrong == []


def test_files_that_pages_name_exist() -> None:
    """A page may leave out the folders above, as architecture.md does in the rooms of a package."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [f"/{name}" for name in listed.stdout.splitlines()]
    form = re.compile(r"`([\w.-]+/[\w./-]+\.(?:go|json|md|py|yaml))`")
    named = {name for page in PAGES for name in form.findall(prose(page))}
    assert len(named) > 50
    assert [name for name in named if not any(file.endswith(f"/{name}") for file in files)] == []


def in_schema(schema: dict[str, Any], names: list[str]) -> bool:
    """Whether a path is one of the schema; below an open object everything is."""
    for name in names:
        schema = schema.get("items", schema)
        if name not in schema.get("properties", {}):
            return bool(
                schema.get("x-kubernetes-preserve-unknown-fields")
                or isinstance(schema.get("additionalProperties"), dict)
                or (schema.get("type") == "object" and "properties" not in schema)
            )
        schema = schema["properties"][name]
    return True


def is_known(path: str) -> bool | None:
    """Whether a dotted name is a field or a value of the chart; None if it is neither's form."""
    names = path.replace("[]", "").replace("[0]", "").split(".")
    if names[0] == "status":
        return any(in_schema(part["status"], names[1:]) for part in PARTS)
    if names[0] == "spec":
        names = names[1:]
    schemas = [VALUES, *(part["spec"] for part in PARTS)]
    roots = [schema for schema in schemas if names[0] in schema["properties"]]
    return any(in_schema(schema, names) for schema in roots) if roots else None


@each_page
def test_fields_exist(page: Path) -> None:
    spoken = re.findall(r"`([a-z]\w*(?:\.\w+(?:\[\])?)+)(?::[^`]*)?`", prose(page))
    assert [path for path in spoken if not path.endswith(FILES) and is_known(path) is False] == []


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("spec.kvTransfer.verify.mode", True),
        ("slo.classes[].percentile", True),
        ("router.podTemplate.spec.priorityClassName", True),
        ("metrics.dashboards.labels.folder", True),
        ("kvTransfer.verify.nonsense", False),
        ("rdma.mode.nonsense", False),
        ("status.nonsense", False),
        ("metrics.nonsense", False),
        ("nonsense.mode", None),
    ],
)
def test_a_field_that_does_not_exist_is_found(path: str, known: bool | None) -> None:
    assert is_known(path) is known


def test_manifests_are_well_formed() -> None:
    checked = 0
    for block in blocks("yaml"):
        for document in yaml.safe_load_all(block.text):
            kind = document.get("kind")
            if kind in SPECS:
                SPECS[kind].model_validate(document["spec"])
            elif kind is None:  # a part of a spec
                InferenceServiceSpec.model_validate({**MINIMAL, **document})
            checked += 1
    assert checked > 10


def tandem_commands() -> set[str]:
    told = {command for _, command in commands() if re.match(r"tandem [a-z]", command)}
    return told.union(*(re.findall(r"`(tandem [a-z][^`]*)`", prose(page)) for page in PAGES))


def test_commands_of_tandem_exist() -> None:
    told = tandem_commands()
    assert len(told) > 10
    for command in told:
        words = command.split()[1:]
        found: Any = typer.main.get_command(app)
        while hasattr(found, "commands") and words and not words[0].startswith("-"):
            name = words.pop(0)
            assert set(name.split("|")) <= set(found.commands), command
            found = found.commands[name.split("|")[0]]
        if command.split()[1] in ("kubectl", "helm", "bench"):
            continue  # they hand on what follows
        known = {name for each in found.params for name in (*each.opts, *each.secondary_opts)}
        options = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert options <= known, command


def test_values_that_commands_set_exist() -> None:
    texts = [command for _, command in commands()]
    texts += [prose(page) for page in PAGES]
    found = [path for text in texts for path in re.findall(r"--set '?([\w.\[\]]+)=", text)]
    assert len(found) > 10
    paths = [re.sub(r"\[\d+\]", "", path) for path in found]
    assert [path for path in paths if not in_schema(VALUES, path.split("."))] == []


def test_the_tests_that_the_tutorial_names_exist() -> None:
    text = (ROOT / "docs/pd-tutorial.md").read_text()
    steps = re.findall(r"^## .*?(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert len(steps) == 8
    for step in steps:
        (told,) = re.findall(r"^\*Run by\* (.*)", step, flags=re.MULTILINE | re.DOTALL)
        named = re.findall(r"`((?:e2e|engine)/[\w/]+\.py)(?:::(\w+))?`", told)
        assert named, step.splitlines()[0]
        for file, test in named:
            assert f"def {test or 'test_'}" in (ROOT / file).read_text(), (file, test)
