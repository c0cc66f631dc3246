"""Values without code: what a mark means in the CRD, in messages, and for objects of before."""

from typing import Any

import pytest

from tandem_operator.api.refusal import MARK, find_refused, is_quantity, refused_unless
from tandem_operator.crds.kinds import KINDS, Kind
from tandem_operator.crds.reference import render_reference
from tandem_operator.plan.support import find_unused
from tandem_operator.tests.bad_manifest import refused_values
from tandem_operator.tests.crds.crd_schema import nodes
from tandem_operator.tests.facts import make_spec

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.plural)


@kinds
def test_no_default_is_refused(kind: Kind) -> None:
    for path, node in nodes(kind.marked_schema()):
        if MARK in node:
            default = node.get("default")
            default = () if default == [] else default
            assert node[MARK].takes(default, quantity=is_quantity(node)), path


@kinds
def test_marks_become_rules_and_stay_out_of_the_crd(kind: Kind) -> None:
    marked = {path for path, node in nodes(kind.marked_schema()) if MARK in node}
    for path, node in nodes(kind.object_schema()):
        assert MARK not in node
        rules = [rule["message"] for rule in node.get("x-kubernetes-validations", ())]
        said = any("in this release, because" in message for message in rules)
        assert said == (path in marked), path


def test_every_refusal_is_in_the_reference_with_its_reason() -> None:
    page = render_reference(KINDS)
    row = next(line for line in page.splitlines() if line.startswith("| `spec.model.adapters`"))
    assert row.endswith("| empty: no worker loads adapters |")
    below = next(line for line in page.splitlines() if "`spec.model.adapters[].uri`" in line)
    assert below.endswith("| as `spec.model.adapters` |")


@pytest.mark.parametrize(
    ("accepts", "schema", "rule"),
    [
        (("None", "Auto"), {"type": "string"}, "self in ['None', 'Auto']"),
        ((False,), {"type": "boolean"}, "self in [false]"),
        ((1,), {"type": "integer"}, "self in [1]"),
        ((1,), {"x-kubernetes-int-or-string": True, "maximum": 9}, "string(self) in ['1']"),
        (
            ("0",),
            {"x-kubernetes-int-or-string": True},
            "quantity(string(self)).compareTo(quantity('0')) == 0",
        ),
        (((),), {"type": "array"}, "size(self) == 0"),
        ((), {"type": "object"}, "false"),
    ],
)
def test_rules(accepts: tuple[Any, ...], schema: dict[str, Any], rule: str) -> None:
    assert refused_unless(*accepts, because="it is so").rule(schema) == rule


def test_messages_name_the_field_the_reason_and_the_remedy() -> None:
    assert refused_unless(1, 2, because="it is so").message("pool.size") == (
        "pool.size must be 1 or 2 in this release, because it is so: remove it, or set it to 1 or 2"
    )
    assert refused_unless(because="it is so").message("claim") == (
        "claim must be unset in this release, because it is so: remove it"
    )


def test_objects_of_other_releases_are_told_apart() -> None:
    assert find_unused(make_spec()) == []
    assert find_unused(make_spec(kvCache={"hostMemory": "0Gi"})) == []
    spec = make_spec(
        kvCache={"hostMemory": "1Gi", "disk": {"claimName": "kv"}},
        autoscaling={"inline": {"burst": {"shed": True}}},
    )
    assert list(find_refused(spec)) == [
        "kvCache.hostMemory",
        "kvCache.disk.claimName",
        "autoscaling.inline.burst.shed",
    ]


def test_there_is_a_bad_manifest_for_every_mark() -> None:
    names = [bad.name for bad in refused_values()]
    assert (
        len(names)
        == len(set(names))
        == sum(MARK in node for kind in KINDS for _, node in nodes(kind.marked_schema()))
    )
