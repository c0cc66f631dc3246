"""The ratio holds on every path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_operator.api.ratio import Ratio, RatioMode, RatioTerm
from tandem_operator.pair import Pair
from tandem_operator.plan.scale.ratio import allows, describe, hold_ratio

numbers = st.integers(0, 64)
counts = st.builds(Pair, numbers, numbers)
terms = st.builds(RatioTerm, prefill=st.integers(1, 8), decode=st.integers(1, 8))


def bounded(low: tuple[int, int] | None, high: tuple[int, int] | None) -> Ratio:
    return Ratio(
        mode=RatioMode.BOUNDED,
        min=RatioTerm(prefill=low[0], decode=low[1]) if low else None,
        max=RatioTerm(prefill=high[0], decode=high[1]) if high else None,
    )


@st.composite
def bounds(draw: st.DrawFn) -> Ratio:
    low, high = draw(terms), draw(terms)
    if low.prefill * high.decode > high.prefill * low.decode:
        low, high = high, low
    one_sided = draw(st.sampled_from(["min", "max", "both"]))
    return Ratio(
        mode=RatioMode.BOUNDED,
        min=None if one_sided == "max" else low,
        max=None if one_sided == "min" else high,
    )


@given(terms, counts, counts)
def test_fixed_is_kept_and_is_stable(term: RatioTerm, wanted: Pair[int], last: Pair[int]) -> None:
    ratio = Ratio(mode=RatioMode.FIXED, fixed=term)
    held = hold_ratio(ratio, wanted, last)
    assert allows(ratio, held)
    assert hold_ratio(ratio, held, held) == held


@given(bounds(), counts, counts)
def test_bounded_is_kept_and_is_stable(ratio: Ratio, wanted: Pair[int], last: Pair[int]) -> None:
    held = hold_ratio(ratio, wanted, last)
    assert allows(ratio, held)
    assert hold_ratio(ratio, held, held) == held
    if allows(ratio, wanted):
        assert held == wanted


@given(counts, counts)
def test_free_changes_nothing(wanted: Pair[int], last: Pair[int]) -> None:
    assert Ratio() == Ratio(mode=RatioMode.FREE)
    assert hold_ratio(Ratio(mode=RatioMode.FREE), wanted, last) == wanted


@pytest.mark.parametrize(
    ("wanted", "last", "held"),
    [
        (Pair(1, 6), Pair(1, 3), Pair(2, 6)),  # decode leads
        (Pair(3, 3), Pair(1, 3), Pair(3, 9)),  # prefill leads
        (Pair(1, 4), Pair(1, 3), Pair(2, 6)),  # rounded up: nothing asked for is missing
        (Pair(2, 3), Pair(2, 6), Pair(1, 3)),
        (Pair(0, 3), Pair(1, 3), Pair(0, 0)),
    ],
)
def test_fixed_follows_the_pool_that_changed(
    wanted: Pair[int], last: Pair[int], held: Pair[int]
) -> None:
    ratio = Ratio(mode=RatioMode.FIXED, fixed=RatioTerm(prefill=1, decode=3))
    assert hold_ratio(ratio, wanted, last) == held


@pytest.mark.parametrize(
    ("wanted", "last", "held"),
    [
        (Pair(1, 10), Pair(1, 4), Pair(1, 6)),  # the write is held back at the bound
        (Pair(9, 2), Pair(2, 2), Pair(8, 2)),
        (Pair(0, 4), Pair(1, 4), Pair(1, 4)),
        (Pair(2, 8), Pair(1, 4), Pair(2, 8)),
    ],
)
def test_bounded_leaves_the_other_pool_alone(
    wanted: Pair[int], last: Pair[int], held: Pair[int]
) -> None:
    assert hold_ratio(bounded((1, 6), (4, 1)), wanted, last) == held


def test_bounded_finds_a_pair_when_no_prefill_fits() -> None:
    ratio = bounded((2, 3), (3, 4))
    held = hold_ratio(ratio, Pair(1, 1), Pair(3, 4))
    assert allows(ratio, held)
    assert held != Pair(0, 0)


def test_the_rule_is_told_in_words() -> None:
    assert describe(bounded((1, 6), (4, 1))) == "ratio min 1:6 and max 4:1"
    fixed = Ratio(mode=RatioMode.FIXED, fixed=RatioTerm(prefill=1, decode=3))
    assert describe(fixed) == "ratio.fixed 1:3"
