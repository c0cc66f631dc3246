"""The ledger and the prefix index on their own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem_engine.cache.ledger import BlockLedger, Holding
from tandem_engine.cache.prefix_index import Entry, PrefixIndex
from tandem_engine.errors import LedgerError
from tandem_wire.hashing import block_hash, prefix_hashes

PAGE, SALT = 4, 99


def fill(ledger: BlockLedger, tokens: list[int]) -> Holding:
    """A holding with the KV of `tokens`, indexed down to a partial last block."""
    holding = ledger.open()
    assert ledger.allocate(holding, -(-len(tokens) // PAGE))
    parent = SALT
    for number, block in enumerate(holding.blocks):
        part = tuple(tokens[number * PAGE : (number + 1) * PAGE])
        hash_ = block_hash(parent, part) if len(part) == PAGE else None
        ledger.register(block, Entry(parent, hash_, part))
        parent = hash_ or parent
    return holding


def match(ledger: BlockLedger, tokens: list[int], *, partial: bool = True) -> tuple[int, int]:
    hashes = prefix_hashes(tokens, PAGE, SALT)
    found = ledger.match(tokens, hashes, SALT, len(tokens) - 1, partial=partial)
    return len(found.blocks), found.num_partial


def test_allocation_is_all_or_nothing() -> None:
    ledger = BlockLedger(4, PAGE)
    holding = ledger.open()
    assert ledger.allocate(holding, 3)
    assert not ledger.allocate(holding, 2)
    assert len(holding.blocks) == 3
    assert ledger.num_used == 3
    ledger.close(holding)
    ledger.check()
    assert ledger.num_available == 4


def test_released_blocks_stay_findable_until_evicted() -> None:
    ledger = BlockLedger(4, PAGE)
    tokens = list(range(10))
    ledger.close(fill(ledger, tokens))
    assert ledger.counts() == {"free": 1, "cached": 3, "owned": 0, "leased": 0, "leaked": 0}
    assert match(ledger, [*tokens, 77]) == (2, 2)
    assert match(ledger, tokens) == (2, 1)  # one token is always left to compute
    assert match(ledger, tokens[:8]) == (1, 3)  # a full block can be copied from in part
    assert match(ledger, tokens, partial=False) == (2, 0)
    other = ledger.open()
    assert ledger.allocate(other, 3)  # the free one, then the tail, then the second block
    assert match(ledger, tokens) == (1, 0)
    stored, removed = ledger.index.take_events()
    assert (len(stored), len(removed)) == (1, 0)  # the second block came and went


def test_an_evicted_block_is_announced_once_while_it_is_still_indexed() -> None:
    ledger = BlockLedger(3, PAGE)
    evicted: list[int] = []

    def spill(block: int) -> None:
        assert block in ledger.index
        evicted.append(block)
        ledger.index.remove(block)

    ledger.on_evict = spill
    first = fill(ledger, list(range(8)))
    blocks = list(first.blocks)
    ledger.close(first)
    other = ledger.open()
    assert ledger.allocate(other, 1)  # the free one
    assert evicted == []
    assert ledger.allocate(other, 2)
    assert evicted == blocks[::-1]  # of one sequence the end goes before the start
    assert other.blocks[1:] == evicted
    ledger.check()


def test_an_eviction_that_leaves_the_block_in_the_index_is_noticed() -> None:
    ledger = BlockLedger(2, PAGE)
    ledger.on_evict = lambda block: None
    ledger.close(fill(ledger, list(range(8))))
    with pytest.raises(AssertionError, match="old content"):
        ledger.allocate(ledger.open(), 1)


def test_shared_blocks_are_freed_by_the_last_holder() -> None:
    ledger = BlockLedger(4, PAGE)
    first, second = fill(ledger, list(range(8))), ledger.open()
    for block in first.blocks:
        ledger.share(second, block)
    ledger.close(first)
    assert ledger.counts()["owned"] == 2
    second.leased = True
    assert ledger.counts()["leased"] == 2
    second.leased = False
    ledger.close(second)
    ledger.check()
    assert ledger.num_available == 4


def test_another_salt_or_a_collision_is_no_match() -> None:
    ledger = BlockLedger(4, PAGE)
    tokens = list(range(9))
    fill(ledger, tokens)
    hashes = prefix_hashes(tokens, PAGE, SALT + 1)
    assert not ledger.match(tokens, hashes, SALT + 1, 8, partial=True).blocks
    forged = prefix_hashes(tokens, PAGE, SALT)  # the right hashes with other tokens
    assert not ledger.match([9] * 9, forged, SALT, 8, partial=False).blocks


def test_equal_tails_are_indexed_once() -> None:
    index = PrefixIndex(PAGE)
    assert index.add(0, Entry(SALT, None, (1, 2))) == 0
    assert index.add(1, Entry(SALT, None, (1, 2))) == 0
    assert index.add(2, Entry(SALT, None, (1, 2, 3))) == 2
    assert len(index) == 2


def test_stored_again_is_no_event() -> None:
    index = PrefixIndex(PAGE)
    index.add(0, Entry(SALT, 5, (1, 2, 3, 4)))
    assert index.take_events() == ([5], [])
    index.remove(0)
    index.add(1, Entry(SALT, 5, (1, 2, 3, 4)))
    assert index.take_events() == ([], [])
    index.remove(1)
    assert index.take_events() == ([], [5])


def fill_poor(ledger: BlockLedger, tokens: list[int], first_whole: int) -> Holding:
    """As `fill`, but the blocks before `first_whole` lack the layers with a window."""
    holding = ledger.open()
    assert ledger.allocate(holding, len(tokens) // PAGE)
    for number, hash_ in enumerate(prefix_hashes(tokens, PAGE, SALT)):
        part = tuple(tokens[number * PAGE : (number + 1) * PAGE])
        parent = prefix_hashes(tokens, PAGE, SALT)[number - 1] if number else SALT
        ledger.register(holding.blocks[number], Entry(parent, hash_, part, number >= first_whole))
    return holding


def test_a_match_ends_where_the_window_behind_it_is_whole() -> None:
    ledger = BlockLedger(8, PAGE, window=6)
    tokens = list(range(20))
    ledger.close(fill_poor(ledger, tokens, first_whole=2))
    # What follows block 3 sees 5 tokens back, into block 2; what follows block 2 sees block 1.
    assert match(ledger, [*tokens, 9]) == (5, 0)
    assert match(ledger, [*tokens[:18], 9, 9]) == (4, 2)
    assert match(ledger, [*tokens[:14], 9, 9]) == (0, 0)  # nor is there a copy of a poor block
    hashes = prefix_hashes(tokens, PAGE, SALT)

    def for_fetch(first_whole: int) -> int:
        found = ledger.match(tokens, hashes, SALT, 19, partial=False, first_whole=first_whole)
        return len(found.blocks)

    # A fetch brings the windows of all blocks that it fills.
    assert [for_fetch(first) for first in range(4)] == [0, 1, 4, 4]


@pytest.mark.parametrize("held", [False, True])
def test_a_poor_block_makes_way_for_a_whole_one(held: bool) -> None:
    ledger = BlockLedger(8, PAGE, window=6)
    tokens = list(range(8))
    poor = fill_poor(ledger, tokens, first_whole=2)
    if not held:
        ledger.close(poor)
    ledger.index.take_events()
    ledger.close(fill(ledger, tokens))
    assert match(ledger, [*tokens, 9]) == (2, 0)
    assert ledger.index.take_events() == ([], [])
    if held:
        ledger.close(poor)
    ledger.check()
    assert ledger.counts() == {"free": 6, "cached": 2, "owned": 0, "leased": 0, "leaked": 0}
    ledger.close(fill_poor(ledger, tokens, first_whole=2))
    assert match(ledger, [*tokens, 9]) == (2, 0)
    ledger.check()


def test_double_release_is_noticed() -> None:
    ledger = BlockLedger(4, PAGE)
    holding = ledger.open()
    ledger.allocate(holding, 1)
    ledger.close(holding)
    with pytest.raises(LedgerError, match="twice"):
        ledger.close(holding)
    forged = ledger.open()
    forged.blocks.append(0)
    with pytest.raises(LedgerError, match="holders"):
        ledger.check()
    with pytest.raises(LedgerError, match="twice"):
        ledger.release(forged)


@pytest.mark.parametrize("damage", ["lost", "free twice", "not cached", "index"])
def test_check_finds_damage(damage: str) -> None:
    ledger = BlockLedger(4, PAGE)
    ledger.close(fill(ledger, list(range(8))))
    if damage == "lost":
        ledger._free.pop()
    elif damage == "free twice":
        ledger._free.append(ledger._free[0])
    elif damage == "not cached":
        ledger.index.remove(next(iter(ledger._cached)))
    else:
        ledger.index._by_hash.clear()
    with pytest.raises(LedgerError):
        ledger.check()
    if damage == "lost":
        assert ledger.counts()["leaked"] == 1


def test_a_short_prompt_is_found_again_however_many_came_after_it() -> None:
    ledger = BlockLedger(200, PAGE)
    mine = [7, 8, 9]
    for number in range(100):
        if number < 3:
            ledger.close(fill(ledger, mine))
        ledger.close(fill(ledger, [100 + number, number, 3]))
    assert match(ledger, [*mine, 1]) == (0, 3)
    assert match(ledger, [7, 8, 5]) == (0, 2)
    assert match(ledger, [103, 3, 3, 1]) == (0, 3)
    assert ledger.counts()["cached"] == 101  # asked three times, kept once
    ledger.check()


def test_what_is_computed_again_is_evicted_last() -> None:
    ledger = BlockLedger(4, PAGE)
    for tokens in ([1, 2, 3, 4], [5, 6], [7, 8]):
        ledger.close(fill(ledger, tokens))
    for again in ([1, 2, 3, 4], [5, 6]):
        ledger.close(fill(ledger, again))  # in the fourth block, which holds nothing afterwards
    other = ledger.open()
    assert ledger.allocate(other, 2)  # the free one, and the least recently used
    found = [match(ledger, [*tokens, 0]) for tokens in ([1, 2, 3, 4], [5, 6], [7, 8])]
    assert found == [(1, 0), (0, 2), (0, 0)]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=PAGE), max_size=30), st.data())
def test_a_partial_match_is_the_longest_there_is(
    tails: list[list[int]], data: st.DataObject
) -> None:
    index = PrefixIndex(PAGE)
    held: dict[int, list[int]] = {}
    for block, tail in enumerate(tails):
        if index.add(block, Entry(SALT, None, tuple(tail))) == block:
            held[block] = tail
        wants_removal = data.draw(st.booleans())
        if held and wants_removal:
            gone = data.draw(st.sampled_from(sorted(held)))
            index.remove(gone)
            del held[gone]
        assert not index.find_fault()
    wanted = data.draw(st.lists(st.integers(0, 2), min_size=PAGE, max_size=PAGE))
    found = index.match(wanted, [], SALT, PAGE, partial=True)
    lengths = [
        next(size for size in range(PAGE, -1, -1) if tail[:size] == wanted[:size])
        for tail in held.values()
    ]
    assert found.num_partial == max(lengths, default=0)
    if found.num_partial:
        assert held[found.partial_block][: found.num_partial] == wanted[: found.num_partial]


def test_index_reports_children_out_of_order() -> None:
    index = PrefixIndex(PAGE)
    index.add(0, Entry(SALT, None, (1, 2)))
    index.add(1, Entry(SALT, None, (2,)))
    index._children[SALT].reverse()
    assert "order" in index.find_fault()


def test_index_reports_lost_children() -> None:
    index = PrefixIndex(PAGE)
    index.add(0, Entry(SALT, 5, (1, 2, 3, 4)))
    index._children.clear()
    assert "children" in index.find_fault()


class LedgerMachine(RuleBasedStateMachine):
    """Random allocations, shares and releases against a plain count of holders."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = BlockLedger(12, PAGE)
        self.holdings: list[Holding] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def place(self, tokens: list[int]) -> None:
        hashes = prefix_hashes(tokens, PAGE, SALT)
        found = self.ledger.match(tokens, hashes, SALT, len(tokens) - 1, partial=False)
        needed = -(-len(tokens) // PAGE) - len(found.blocks)
        room = self.ledger.num_free_after(found)
        holding = self.ledger.open()
        for block in found.blocks:
            self.ledger.share(holding, block)
        assert self.ledger.allocate(holding, needed) == (needed <= room)
        if needed > room:
            self.ledger.close(holding)
            return
        self.holdings.append(holding)
        parent = SALT
        for number, block in enumerate(holding.blocks):
            part = tuple(tokens[number * PAGE : (number + 1) * PAGE])
            hash_ = hashes[number] if number < len(hashes) else None
            self.ledger.register(block, Entry(parent, hash_, part))
            parent = hash_ or parent

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.holdings) - 1))
        self.ledger.close(self.holdings.pop(place))

    @invariant()
    def adds_up(self) -> None:
        self.ledger.check()
        counts = self.ledger.counts()
        held = {block for holding in self.holdings for block in holding.blocks}
        assert counts["owned"] == len(held) == self.ledger.num_used
        assert counts["leaked"] == 0


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
