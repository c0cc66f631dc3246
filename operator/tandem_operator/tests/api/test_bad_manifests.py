"""The list of manifests that must be refused: complete, and each with what it expects.

The refusals themselves need an API server: `e2e/tests/test_admission.py`.
"""

import pytest

from tandem_operator.crds.kinds import KINDS
from tandem_operator.tests.bad_manifest import BAD_MANIFESTS, BadManifest
from tandem_operator.tests.crds.crd_schema import rule_messages

# Rules about changes need two manifests; the end-to-end test makes them by patch.
TRANSITIONS = {"spec.serviceName can't be changed", "spec.role can't be changed"}


@pytest.mark.parametrize("bad", BAD_MANIFESTS, ids=lambda bad: bad.name)
def test_each_says_what_it_expects(bad: BadManifest) -> None:
    assert bad.what
    assert bad.field
    assert bad.message
    assert bad.manifest["kind"] in {kind.kind for kind in KINDS}


def test_there_are_enough() -> None:
    assert len(BAD_MANIFESTS) >= 25


def test_every_rule_has_a_manifest_that_breaks_it() -> None:
    expected = [bad.message for bad in BAD_MANIFESTS]
    for kind in KINDS:
        for message in rule_messages(kind.object_schema()):
            if not message.startswith(tuple(TRANSITIONS)):
                assert any(part in message for part in expected), message
