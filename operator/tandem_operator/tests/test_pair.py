"""Pairs: one value per role, in a fixed order."""

from dataclasses import FrozenInstanceError

import pytest

from tandem_operator.pair import Pair, Role
from tandem_operator.tests.facts import make_spec

SIZES = Pair(1, 3)


def test_a_value_is_found_by_its_role() -> None:
    assert [SIZES.of(role) for role in Role] == [1, 3]
    assert Pair.build(SIZES.of) == SIZES
    assert dict(SIZES.items()) == {Role.PREFILL: 1, Role.DECODE: 3}


def test_a_pair_goes_through_functions() -> None:
    assert SIZES.map(str) == Pair("1", "3")
    assert SIZES.zip(Pair("p", "d")) == Pair((1, "p"), (3, "d"))
    assert (sum(SIZES), max(SIZES)) == (4, 3)


def test_put_changes_a_copy() -> None:
    assert SIZES.put(Role.PREFILL, 2) == Pair(2, 3)
    assert SIZES.put(Role.DECODE, 2) == Pair(1, 2)
    assert Pair(1, 3) == SIZES
    with pytest.raises(FrozenInstanceError):
        SIZES.prefill = 2  # type: ignore[misc]


def test_a_spec_has_a_pool_for_each_role() -> None:
    spec = make_spec(prefill={"replicas": 2}, decode={"replicas": 5})
    assert spec.pools.map(lambda pool: pool.replicas) == Pair(2, 5)
    assert spec.pool(Role.DECODE) is spec.decode
