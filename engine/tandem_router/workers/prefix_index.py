"""Which prefix-cache blocks a worker holds, according to its KvEvents."""

from collections.abc import Sequence

from tandem_wire.messages import KvEvents


class PrefixIndex:
    """The block hashes of one worker; all are forgotten when an event was missed."""

    __slots__ = ("_blocks", "_next_sequence")

    def __init__(self) -> None:
        self._blocks: set[int] = set()
        self._next_sequence: int | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    def apply(self, events: KvEvents) -> None:
        """Follow the worker's cache; after a gap in the sequence the index starts from nothing."""
        gap = self._next_sequence is not None and events.sequence != self._next_sequence
        if events.cleared or gap:
            self._blocks.clear()
        self._next_sequence = events.sequence + 1
        self._blocks.difference_update(events.removed)
        self._blocks.update(events.stored)

    def clear(self) -> None:
        """Forget everything: the worker has restarted."""
        self._blocks.clear()
        self._next_sequence = None

    def num_matching_blocks(self, hashes: Sequence[int]) -> int:
        """How many leading blocks of a chain are held."""
        count = 0
        for value in hashes:
            if value not in self._blocks:
                break
            count += 1
        return count
