"""The block ledger: every KV block has exactly one state, and an account of who holds it."""

from collections import OrderedDict
from collections.abc import Callable

from tandem_engine.cache.prefix_index import Entry, PrefixIndex, PrefixMatch
from tandem_engine.errors import LedgerError


class Holding:
    """The blocks of one sequence, in token order; changed by the ledger alone.

    `leased` while the hand-off reads from or writes into some of the blocks: then they may be
    neither released nor written by the runner.
    """

    __slots__ = ("blocks", "leased")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.leased = False


class BlockLedger:
    """Blocks 0 to num_blocks - 1, each in one state:

    free      holds nothing
    cached    holds an indexed prefix, held by no one, evictable (least recently used first)
    owned     held by one sequence, or shared by several that have the same prefix
    leased    in a holding that the hand-off works on

    The core thread alone calls it. `check` states the invariants.

    A cached block is evicted when a fresh one is needed and none is free. `on_evict` is called with
    it first, while its content is still there, and must take it out of the index. By default that
    is all that happens.
    """

    def __init__(self, num_blocks: int, page_size: int, window: int = 0) -> None:
        self.num_blocks = num_blocks
        self.page_size = page_size
        self.window = window  # of the layers that have one; 0: none has
        self.index = PrefixIndex(page_size, window)
        self.on_evict: Callable[[int], None] = self.index.remove
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holdings: dict[int, Holding] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free ones and evictable ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks held by sequences."""
        return self.num_blocks - self.num_available

    def open(self) -> Holding:
        """A new, empty holding; `close` ends it."""
        holding = Holding()
        self._holdings[id(holding)] = holding
        return holding

    def allocate(self, holding: Holding, count: int) -> bool:
        """Append `count` fresh blocks, evicting cached ones if need be; False if there is no room.

        All or nothing.
        """
        if count > self.num_available:
            return False
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self.on_evict(block)
                assert block not in self.index, "an evicted block would be found by its old content"
            self._refs[block] = 1
            holding.blocks.append(block)
        return True

    def share(self, holding: Holding, block: int) -> None:
        """Append an indexed block, which its other holders, if any, keep too."""
        assert block in self.index, "only indexed blocks have content that may be shared"
        if self._refs[block] == 0:
            del self._cached[block]
        self._refs[block] += 1
        holding.blocks.append(block)

    def release(self, holding: Holding) -> None:
        """Give all blocks of a holding back; indexed ones stay cached."""
        assert not holding.leased, "the hand-off still works on these blocks"
        # Tail first: of one sequence the end should be evicted before the start.
        for block in reversed(holding.blocks):
            refs = self._refs[block] - 1
            if refs < 0:
                raise LedgerError(f"block {block} was released twice")
            self._refs[block] = refs
            if refs == 0:
                if block in self.index:
                    self._cached[block] = None
                else:
                    self._free.append(block)
        holding.blocks.clear()

    def close(self, holding: Holding) -> None:
        """Release a holding for good."""
        if self._holdings.pop(id(holding), None) is None:
            raise LedgerError("a holding was closed twice")
        self.release(holding)

    def match(
        self,
        tokens: list[int],
        hashes: list[int],
        salt: int,
        limit: int,
        *,
        partial: bool,
        first_whole: int | None = None,
    ) -> PrefixMatch:
        """The longest indexed prefix; its blocks stay evictable until they are shared."""
        return self.index.match(
            tokens, hashes, salt, limit, partial=partial, first_whole=first_whole
        )

    def num_free_after(self, match: PrefixMatch) -> int:
        """Blocks left to allocate once the matched ones are shared."""
        refs = self._refs
        return self.num_available - sum(1 for block in match.blocks if refs[block] == 0)

    def register(self, block: int, entry: Entry) -> None:
        """The content of a held block is final: others may share it, and it outlives its holder.

        A block with the same tokens that lacks layers makes way for it.
        """
        assert self._refs[block] > 0, "only a holder knows what a block contains"
        poorer = self.index.poorer(entry)
        if poorer is not None:
            self.index.remove(poorer)
            if poorer in self._cached:
                del self._cached[poorer]
                self._free.append(poorer)
        known = self.index.add(block, entry)
        if known in self._cached:  # its content has just been used, if in another block
            self._cached.move_to_end(known)

    def counts(self) -> dict[str, int]:
        """Blocks by state; `leaked` are in no state at all."""
        leased = {
            block
            for holding in self._holdings.values()
            if holding.leased
            for block in holding.blocks
        }
        held = {block for holding in self._holdings.values() for block in holding.blocks}
        free, cached = len(self._free), len(self._cached)
        return {
            "free": free,
            "cached": cached,
            "owned": len(held) - len(leased),
            "leased": len(leased),
            "leaked": self.num_blocks - free - cached - len(held),
        }

    def check(self) -> None:
        """Raise LedgerError unless every block has exactly one state and the counts are true."""
        refs = [0] * self.num_blocks
        for holding in self._holdings.values():
            for block in holding.blocks:
                refs[block] += 1
        if refs != self._refs:
            wrong = [b for b in range(self.num_blocks) if refs[b] != self._refs[b]]
            raise LedgerError(f"blocks {wrong[:8]} have holders that the ledger doesn't know of")
        free = set(self._free)
        if len(free) != len(self._free):
            raise LedgerError("a block is free twice")
        for block, count in enumerate(refs):
            states = (count > 0) + (block in free) + (block in self._cached)
            if states != 1:
                raise LedgerError(f"block {block} has {states} states")
            if count == 0 and (block in self._cached) != (block in self.index):
                raise LedgerError(f"block {block} is cached or indexed, but not both")
        fault = self.index.find_fault()
        if fault:
            raise LedgerError(fault)
