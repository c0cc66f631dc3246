"""Every leaf of the chart's values changes what is rendered, and the operator reads its part of it.

`pytest -s` prints the list. A leaf's sample comes from values.schema.json: its example, or what its
type gives.
"""

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml

from tandem_operator.config import Config, read_config
from tests.chart import CHART, Document, container, key_of, render

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
HELMS_OWN = "global"
KUBERNETES = "Kubernetes' own type"

CONTEXTS: dict[str, dict[str, Any]] = {
    "podDisruptionBudget": {"replicas": 3},
    "serviceAccount.create": {"serviceAccount.name": "inference"},
}
"""What must be set too for a leaf, or for a section, to be accepted. A section's own `enabled` is
always set for its other leaves."""


def leaves(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every value that one sets: an object with an example is one too."""
    if "properties" not in schema or "examples" in schema:
        yield path, schema
        return
    for name, child in schema["properties"].items():
        yield from leaves(child, f"{path}.{name}".lstrip("."))


LEAVES = {path: schema for path, schema in leaves(SCHEMA) if path != HELMS_OWN}
each_leaf = pytest.mark.parametrize("path", LEAVES)


def default(path: str) -> Any:
    found: Any = VALUES
    for name in path.split("."):
        found = found[name]
    return found


def sample(path: str) -> Any:
    """A value that isn't the default."""
    schema, old = LEAVES[path], default(path)
    if "examples" in schema:
        return schema["examples"][0]
    if "enum" in schema:
        return next(value for value in schema["enum"] if value != old)
    made: dict[str, Any] = {"boolean": lambda: not old, "integer": lambda: old + 1}
    return made[schema["type"]]()


def context(path: str) -> dict[str, Any]:
    section = path.rpartition(".")[0]
    found = dict(CONTEXTS.get(section, {}) | CONTEXTS.get(path, {}))
    switch = f"{section}.enabled"
    if switch in LEAVES and switch != path:
        found[switch] = True
    return found


@cache
def both(path: str) -> tuple[list[Document], list[Document]]:
    """What is rendered without and with the leaf's sample."""
    around = context(path)
    return render(around), render(around | {path: sample(path)})


def changed(path: str) -> list[Document]:
    """Manifests of the sample that are new or different, or those that are gone."""
    before, after = ({key_of(each): each for each in made} for made in both(path))
    found = [each for key, each in after.items() if before.get(key) != each]
    return found or [each for key, each in before.items() if key not in after]


def config_of(documents: list[Document]) -> Config:
    """The operator's configuration in the pod."""
    made = container(documents)
    env = {each["name"]: each.get("value", each["name"]) for each in made["env"]}
    return read_config(made["args"], env)


@each_leaf
def test_every_leaf_changes_a_manifest(path: str) -> None:
    assert default(path) != sample(path)
    assert changed(path)


@each_leaf
def test_what_changes_in_the_flags_changes_the_operator(path: str) -> None:
    before, after = both(path)
    if container(before)["args"] != container(after)["args"]:
        assert config_of(before) != config_of(after)


def test_the_leaves_are_counted() -> None:
    kinds = {path: sorted({each["kind"] for each in changed(path)}) for path in LEAVES}
    for path, found in kinds.items():
        print(f"{path}: {', '.join(found)}")
    print(len(LEAVES), Counter(kind for found in kinds.values() for kind in found))
    reached = {path for path in LEAVES if config_of(both(path)[0]) != config_of(both(path)[1])}
    print("flags:", sorted(reached))
    assert reached >= {"leaderElection.leaseName", "logLevel", "watchNamespaces", "extraArgs"}


def test_the_api_server_knows_every_field_that_a_leaf_writes(cluster: Any) -> None:
    # Of others, and the installed release's.
    skipped = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "CustomResourceDefinition"}
    wanted: list[Document] = []
    for number, path in enumerate(LEAVES):
        for document in both(path)[1]:
            if document["kind"] not in skipped and document in changed(path):
                named = {"namespace": "default", "name": f"leaf-{number}-{len(wanted)}"}
                wanted.append(document | {"metadata": document["metadata"] | named})
    done = cluster.kubectl(
        "create", "--dry-run=server", "--validate=strict", "-f", "-",
        input=yaml.safe_dump_all(wanted),
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == len(wanted)


def objects(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema of an object, however deep."""
    if isinstance(schema, dict):
        if "object" in schema.get("type", ()):
            yield path, schema
        for name, child in schema.items():
            if name != "examples":
                yield from objects(child, f"{path}.{name}")


def test_no_object_takes_unknown_names() -> None:
    found = dict(objects(SCHEMA))
    kubernetes = {path for path, each in found.items() if KUBERNETES in each.get("$comment", "")}
    print(len(found), "objects,", len(kubernetes), "of them Kubernetes' own types")
    for path, schema in found.items():
        if path in kubernetes or path == f".properties.{HELMS_OWN}":
            continue
        closed = schema["additionalProperties"] is False and schema["properties"]
        assert closed or "type" in schema["additionalProperties"], path


class Asked(dict[str, str]):
    """An environment that notes the names of what is read."""

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


def test_the_operator_reads_every_variable_that_the_chart_writes() -> None:
    env = Asked()
    read_config([], env)
    written = {each["name"] for each in container(render())["env"]}
    assert written == {"POD_NAME", "POD_NAMESPACE"}
    assert written <= env.names
    for name in written:
        assert read_config([], {}) != read_config([], {name: "other"})


def test_every_flag_that_the_chart_writes_has_its_effect() -> None:
    documents = render({"watchNamespaces": ["team-a"]})
    config, ports = config_of(documents), container(documents)["ports"]
    assert {each["name"]: each["containerPort"] for each in ports} == {
        "health": config.health_port,
        "metrics": config.metrics_port,
    }
    written = container(documents)["args"]
    others = {"--health-port": "7", "--metrics-port": "7", "--log-level": "debug"}
    env = {"POD_NAME": "a"}
    for flag in written:
        name = flag.partition("=")[0]
        value = f"{name}={others.get(name, 'other')}"
        changed_to = [value if each == flag else each for each in written]
        assert read_config(changed_to, env) != read_config(written, env), flag
