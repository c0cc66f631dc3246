"""The tokens that each sequence has had, on the device, so that no step has to send them again."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tandem_engine.device import upload
from tandem_engine.step import BatchItem, has_penalties


@dataclass(slots=True)
class _Sequence:
    """A row of the table and how much of the sequence is in it."""

    slot: int
    num_prompt: int
    num_output: int


@dataclass(slots=True)
class _Changes:
    """What a step adds to the table. No place comes twice."""

    cleared: list[int] = field(default_factory=list)  # slots
    places: list[int] = field(default_factory=list)  # in the table's flat order
    marks: list[int] = field(default_factory=list)

    def add(self, start: int, tokens: Sequence[int], vocab: int, mark: int, most: int) -> None:
        """Add `mark` for each of a token's first `most` occurrences; `vocab` bounds the tokens."""
        unique, times = np.unique(np.asarray(tokens, np.int64), return_counts=True)
        inside = unique < vocab
        self.places += (start + unique[inside]).tolist()
        self.marks += (mark * np.minimum(times[inside], most)).tolist()


class SeenTokens:
    """A table [slots, V] int32 that `penalize` reads, with a row per sequence that needs one.

    It holds nothing that isn't in the items too: a sequence whose row was given away gets a new
    one. So no one has to report the end of a sequence.
    """

    def __init__(self, vocab: int, device: torch.device) -> None:
        self.table = torch.zeros((8, vocab), dtype=torch.int32, device=device)
        self._sequences: dict[str, _Sequence] = {}  # least recently used first
        self._free = list(range(8))

    def update(self, items: Sequence[BatchItem]) -> torch.Tensor:
        """Add the items' latest tokens; returns their rows of the table [B] int32, or -1."""
        wanting = [item for item in items if has_penalties(item.params)]
        self._make_room(wanting)
        prompts, outputs = _Changes(), _Changes()
        vocab = self.table.shape[1]
        for item in wanting:
            known = self._sequences[item.rid]
            start = known.slot * vocab
            if known.num_prompt < 0:
                prompts.cleared.append(known.slot)
                if item.prompt_tokens:
                    prompts.add(start, item.prompt_tokens, vocab, 1, 1)
                known.num_prompt = len(item.prompt_tokens)
            fresh = item.output_tokens[known.num_output :]
            if fresh:
                outputs.add(start, fresh, vocab, 2, len(fresh))
            known.num_output = len(item.output_tokens)
        self._apply(prompts)
        self._apply(outputs)
        slots = [
            self._sequences[item.rid].slot if has_penalties(item.params) else -1 for item in items
        ]
        return upload(slots, torch.int32, self.table.device)

    def _make_room(self, items: Sequence[BatchItem]) -> None:
        """Give each of `items` a row, if need be that of a sequence that is not among them."""
        missing: list[str] = []
        for item in items:
            known = self._sequences.pop(item.rid, None)
            if known is None:
                missing.append(item.rid)
                continue
            if known.num_prompt != len(item.prompt_tokens) or known.num_output > len(
                item.output_tokens
            ):
                known = _Sequence(known.slot, -1, 0)
            self._sequences[item.rid] = known
        # Those that were just put back are the last ones.
        idle = list(self._sequences)[: len(self._sequences) - (len(items) - len(missing))]
        while idle and len(self._free) < len(missing):
            self._free.append(self._sequences.pop(idle.pop(0)).slot)
        while len(self._free) < len(missing):
            count = self.table.shape[0]
            self.table = torch.cat((self.table, torch.zeros_like(self.table)))
            self._free += range(count, 2 * count)
        for rid in missing:
            self._sequences[rid] = _Sequence(self._free.pop(), -1, 0)

    def _apply(self, changes: _Changes) -> None:
        device = self.table.device
        if changes.cleared:
            self.table[upload(changes.cleared, torch.int64, device)] = 0
        if changes.places:
            flat = self.table.view(-1)
            places = upload(changes.places, torch.int64, device)
            flat[places] += upload(changes.marks, torch.int32, device)
