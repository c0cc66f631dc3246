"""Finds blocks by the tokens they hold: a radix view over chained block hashes."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from tandem_engine.window import first_seen


@dataclass(frozen=True, slots=True)
class Entry:
    """What one indexed block holds: `tokens` after the prefix whose hash is `parent`.

    A full block has a hash of its own and can be a parent; a partial one (`hash` None) is the tail
    of a finished sequence and can only be copied from. One that is not `whole` came by a hand-off
    and lacks the layers with a window.
    """

    parent: int
    hash: int | None
    tokens: tuple[int, ...]
    whole: bool = True


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Blocks that hold the start of a sequence.

    `blocks` are full and may be shared; `partial_block`, if any, holds the next `num_partial`
    tokens and must be copied before anything is written behind them.
    """

    blocks: list[int]
    partial_block: int = -1
    num_partial: int = 0


class PrefixIndex:
    """Blocks by chained hash and by parent; knows nothing about owners.

    A hash is only trusted together with the tokens themselves, so a collision costs a recompute and
    never a wrong answer.
    """

    def __init__(self, page_size: int, window: int = 0) -> None:
        self._page_size = page_size
        self._window = window
        self._entries: dict[int, Entry] = {}
        self._by_hash: dict[int, int] = {}
        # By parent, in the order of their tokens: who shares most with a tuple stands beside it.
        self._children: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        # Net changes since the last report; dicts, because order matters and lookups are frequent.
        self._stored: dict[int, None] = {}
        self._removed: dict[int, None] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, block: int, entry: Entry) -> int:
        """Index `block`, unless another block has its content; the block that is found by it."""
        if block in self._entries:
            return block
        known = self._find_tail(entry) if entry.hash is None else self._by_hash.get(entry.hash)
        if known is not None:
            return known
        self._entries[block] = entry
        insort(self._children.setdefault(entry.parent, []), (entry.tokens, block))
        if entry.hash is not None:
            self._by_hash[entry.hash] = block
            if entry.hash in self._removed:
                del self._removed[entry.hash]
            else:
                self._stored[entry.hash] = None
        return block

    def remove(self, block: int) -> None:
        """Forget `block`, which is about to be overwritten."""
        entry = self._entries.pop(block)
        siblings = self._children[entry.parent]
        del siblings[bisect_left(siblings, (entry.tokens, block))]
        if not siblings:
            del self._children[entry.parent]
        if entry.hash is not None:
            del self._by_hash[entry.hash]
            if entry.hash in self._stored:
                del self._stored[entry.hash]
            else:
                self._removed[entry.hash] = None

    def poorer(self, entry: Entry) -> int | None:
        """The block that has the tokens of a full, whole `entry`, but lacks some of its layers."""
        known = self._by_hash.get(entry.hash) if entry.whole and entry.hash is not None else None
        return None if known is None or self._entries[known].whole else known

    def is_whole(self, block: int) -> bool:
        """Whether `block` is indexed and has all layers."""
        entry = self._entries.get(block)
        return entry is not None and entry.whole

    def match(
        self,
        tokens: Sequence[int],
        hashes: Sequence[int],
        salt: int,
        limit: int,
        *,
        partial: bool,
        first_whole: int | None = None,
    ) -> PrefixMatch:
        """The longest indexed prefix of `tokens`, at most `limit` tokens.

        `hashes` are the chained hashes of the full blocks of `tokens`. With `partial` the match may
        end inside a block. The blocks that the layers with a window will see are whole: those from
        `first_whole` on, or without it those that the first token behind the match sees.
        """
        page, parent = self._page_size, salt
        blocks: list[int] = []
        num_usable, last_poor = 0, -1
        for number in range(min(len(hashes), limit // page)):
            block = self._by_hash.get(hashes[number])
            if block is None:
                break
            if self._entries[block].tokens != tuple(tokens[number * page : (number + 1) * page]):
                break
            blocks.append(block)
            if not self._entries[block].whole:
                last_poor = number
            seen = first_whole
            if seen is None:
                seen = first_seen(len(blocks) * page, self._window, page)
            if last_poor < seen:
                num_usable, parent = len(blocks), hashes[number]
        del blocks[num_usable:]
        start = len(blocks) * page
        if not partial or start >= limit:
            return PrefixMatch(blocks)
        wanted = tuple(tokens[start : min(start + page, limit)])
        siblings = self._children.get(parent, [])
        at = bisect_left(siblings, (wanted, -1))
        best_block, best = -1, 0
        for its_tokens, block in siblings[max(0, at - 1) : at + 1]:
            common = _common_length(its_tokens, wanted)
            if common > best and self._entries[block].whole:
                best_block, best = block, common
        return PrefixMatch(blocks, best_block, best)

    def take_events(self) -> tuple[list[int], list[int]]:
        """Hashes (stored, removed) since the last call; what came and went is in neither."""
        stored, removed = list(self._stored), list(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed

    def hashes(self) -> list[int]:
        """Hashes of all full blocks, oldest first."""
        return list(self._by_hash)

    def _find_tail(self, entry: Entry) -> int | None:
        """A whole block that holds the tokens of a partial one, and maybe more."""
        siblings = self._children.get(entry.parent, [])
        for at in range(bisect_left(siblings, (entry.tokens, -1)), len(siblings)):
            tokens, block = siblings[at]
            if tokens[: len(entry.tokens)] != entry.tokens:
                break
            if self._entries[block].whole:
                return block
        return None

    def find_fault(self) -> str:
        """Empty when the three maps agree, else what is wrong."""
        full = {block for block, entry in self._entries.items() if entry.hash is not None}
        if set(self._by_hash.values()) != full or len(self._by_hash) != len(full):
            return "prefix index: hashes and entries disagree"
        if sum(len(siblings) for siblings in self._children.values()) != len(self._entries):
            return "prefix index: children and entries disagree"
        if any(siblings != sorted(siblings) for siblings in self._children.values()):
            return "prefix index: children are out of order"
        return ""


def _common_length(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
