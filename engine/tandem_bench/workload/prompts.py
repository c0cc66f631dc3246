"""Prompts of random tokens: equal seeds give equal prompts, which share what the plan shares."""

from collections import OrderedDict
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from tandem_bench.workload.planned import PlannedRequest

PromptKind = Literal["ids", "text"]
Tokens = npt.NDArray[np.int32]

FIRST_TOKEN: Final = 16
"""Lower ids are special tokens in most vocabularies."""
KEPT_BLOCKS: Final = 4096
_OWN, _BLOCK, _WARMUP = 0, 1, 2

_COMMON: Final = (
    "the of and to in is was for that on with as are by from at this have not which their has "
    "were been more one can other about time only new some could these two may then do first any "
    "my now such like our over man me even most made after also did many before must through"
)
WORDS: Final = tuple(_COMMON.split())
"""Common English words: about one token each in every vocabulary."""


class PromptMaker:
    """Turns plans into prompts: token ids below `vocab_size`, or as many words.

    A block of a plan gets the same tokens wherever it appears; the rest of a prompt is its own.
    `nonce` separates calls and `salt` the runs of a sweep, so that no run finds the prompts of
    another cached. Shared blocks differ between runs as well.
    """

    def __init__(
        self,
        kind: PromptKind,
        vocab_size: int,
        seed: int,
        *,
        nonce: int = 0,
        salt: int = 0,
        keep: int = KEPT_BLOCKS,
    ) -> None:
        self.kind = kind
        self._high = max(vocab_size, FIRST_TOKEN + 1)
        self._seed = [seed, nonce, salt]
        self._blocks: OrderedDict[int, Tokens] = OrderedDict()
        self._keep = keep

    def tokens(self, planned: PlannedRequest) -> Tokens:
        """[input_tokens] ids."""
        size, left = planned.block_tokens, planned.shared_tokens
        parts: list[Tokens] = []
        for block_id in planned.block_ids:
            if left <= 0:
                break
            parts.append(self._block(block_id, size)[:left])
            left -= size
        rest = planned.input_tokens - sum(len(part) for part in parts)
        if rest > 0:
            parts.append(self._draw(_OWN, planned.number, rest))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def prompt(self, planned: PlannedRequest) -> list[int] | str:
        """What goes into the request's `prompt`."""
        return self._shape(self.tokens(planned))

    def warmup(self, number: int, length: int) -> list[int] | str:
        """A prompt that shares nothing with any plan."""
        return self._shape(self._draw(_WARMUP, number, length))

    def _shape(self, tokens: Tokens) -> list[int] | str:
        if self.kind == "ids":
            ids: list[int] = tokens.tolist()
            return ids
        words = len(WORDS)
        return " ".join(WORDS[token % words] for token in tokens.tolist())

    def _block(self, block_id: int, size: int) -> Tokens:
        found = self._blocks.get(block_id)
        if found is None or len(found) < size:
            found = self._blocks[block_id] = self._draw(_BLOCK, block_id, size)
            if len(self._blocks) > self._keep:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(block_id)
        return found

    def _draw(self, stream: int, number: int, length: int) -> Tokens:
        rng = np.random.Generator(np.random.PCG64([*self._seed, stream, number]))
        return rng.integers(FIRST_TOKEN, self._high, length, dtype=np.int32)
