"""Every leaf of the API has an effect, shown here or by the test that is named, or is refused.

`pytest -s` prints the list.
"""

import importlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.autoscaling_policy import OnStale
from tandem_operator.api.refusal import MARK
from tandem_operator.crds.kinds import AUTOSCALING_POLICY, INFERENCE_SERVICE, KINDS, WORKER_POOL
from tandem_operator.manifests.fleet import build_pool
from tandem_operator.pair import Role
from tandem_operator.tests.api.field_effects import STALE, decisions, manifests
from tandem_operator.tests.api.field_samples import (
    BASE,
    GPUS,
    NAMED,
    POLICY_BASE,
    POLICY_SAMPLES,
    SAMPLES,
    at,
    put,
)
from tandem_operator.tests.api.named_proofs import asserts, reachable, words
from tandem_operator.tests.facts import make_observed, make_spec

INLINE = "autoscaling.inline."


def leaves(schema: dict[str, Any], path: str = "", refused: bool = False) -> Iterator[Any]:
    """(path, whether it is refused) of every leaf; what is below a refused field is refused."""
    refused = refused or MARK in schema
    items = schema.get("items", {})
    if "properties" in schema:
        for name, child in schema["properties"].items():
            yield from leaves(child, f"{path}.{name}".lstrip("."), refused)
    elif "properties" in items:
        yield from leaves(items, f"{path}[]", refused)
    else:
        yield path, refused


def spec_leaves(kind: Any) -> dict[str, bool]:
    return dict(leaves(kind.marked_schema()["properties"]["spec"]))


SERVICE = spec_leaves(INFERENCE_SERVICE)
POLICY = spec_leaves(AUTOSCALING_POLICY)
POOL = spec_leaves(WORKER_POOL)


def partly(path: str, schema: dict[str, Any]) -> bool:
    """Whether a refused field still has a choice: more than one value is accepted."""
    for name in path.split("."):
        schema = schema.get("properties", {}).get(name, {})
    mark = schema.get(MARK)
    return mark is not None and len(mark.accepts) > 1


def open_leaves(kind: Any) -> set[str]:
    schema = kind.marked_schema()["properties"]["spec"]
    found = spec_leaves(kind)
    return {path for path, refused in found.items() if not refused or partly(path, schema)}


def effect_of(path: str) -> str:
    if path.startswith(INLINE):
        path = path.removeprefix(INLINE)
    if path in NAMED:
        return f"test {NAMED[path]}"
    if path in SAMPLES:
        return "manifests"
    return "decisions" if path in POLICY_SAMPLES else ""


@pytest.mark.parametrize("path", sorted(SAMPLES))
def test_a_field_of_a_service_changes_a_manifest(path: str) -> None:
    base, value = SAMPLES[path]
    before = InferenceServiceSpec.model_validate(put(BASE, base))
    after = InferenceServiceSpec.model_validate(put(put(BASE, base), value))
    assert manifests(before) != manifests(after)


@pytest.mark.parametrize("path", sorted(POLICY_SAMPLES))
def test_a_field_of_a_policy_changes_a_decision(path: str) -> None:
    base, value = POLICY_SAMPLES[path]
    policies = (put(POLICY_BASE, base), put(put(POLICY_BASE, base), value))
    before, after = (
        decisions(InferenceServiceSpec.model_validate(put(GPUS, at("autoscaling.inline", one))))
        for one in policies
    )
    assert before != after


@pytest.mark.parametrize("path", sorted(NAMED))
def test_the_named_test_uses_the_field_and_asserts(path: str) -> None:
    """The test itself, with what it calls in its module; a module may be about many fields."""
    name, _, test = NAMED[path].partition("::")
    module = importlib.import_module(f"tandem_operator.tests.{name}")
    assert callable(getattr(module, test))
    used = reachable(module, test)
    for part in path.removeprefix("WorkerPool.").replace("[]", "").split(".")[-2:]:
        assert part.lower() in set(words(used)), f"{NAMED[path]} has nothing to do with {part}"
    assert asserts(used)


def test_stale_metrics_hold_both_pools() -> None:
    assert [str(value) for value in OnStale] == ["Hold"], "signals.onStale has one value"
    spec = make_spec(autoscaling={"inline": {"signals": {"onStale": "Hold"}}})
    said = decisions(spec, (STALE,))
    assert said
    assert all("sizes are kept: no complete metrics" in text for text in said)


def test_the_operator_writes_its_pools() -> None:
    made = build_pool(make_observed(), Role.DECODE, 3, 3, "", "r1")["spec"]
    wanted = {"serviceName": "qwen", "role": "Decode", "replicas": 3, "revision": "r1"}
    assert made == wanted
    assert set(made) == set(POOL)


def test_every_leaf_has_its_proof() -> None:
    listed = []
    for kind, found in ((INFERENCE_SERVICE, SERVICE), (AUTOSCALING_POLICY, POLICY)):
        works = open_leaves(kind)
        for path in found:
            proof = effect_of(path) if path in works else "refused"
            listed.append((kind.kind, path, proof))
    listed += [(WORKER_POOL.kind, path, effect_of(f"WorkerPool.{path}")) for path in POOL]
    for name, path, proof in listed:
        print(f"{name}.spec.{path}: {proof}")
    print(Counter(proof.split(" ")[0] for _, _, proof in listed), len(listed))
    assert not [f"{name}.{path}" for name, path, proof in listed if not proof]


def test_no_proof_is_left_over() -> None:
    known = open_leaves(INFERENCE_SERVICE) | open_leaves(AUTOSCALING_POLICY)
    known |= {f"WorkerPool.{path}" for path in POOL}
    assert set(SAMPLES) | set(POLICY_SAMPLES) | set(NAMED) <= known
    assert len(KINDS) == 3
