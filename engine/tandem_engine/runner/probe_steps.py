"""Steps made up before there are requests, to compile kernels with and to measure memory.

They read and write the first block alone, so their results mean nothing.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from tandem_engine.step import Batch, BatchItem
from tandem_wire.messages import SamplingParams

_CHUNKS: Final = (2, 17, 33, 65, 129)
"""Tokens of chunks which between them use each of attention's tile heights."""
_COSTLY: Final = SamplingParams(
    max_tokens=1, temperature=1.0, top_p=0.9, presence_penalty=0.5, logprobs=5
)
_UNREAD: Final = msgspec.structs.replace(_COSTLY, logprobs=None)
"""Without logprobs, which are looked up by the chosen tokens: those must be real."""


def small_batches() -> list[Batch]:
    """Steps of one chunk each, which between them use all of attention's configurations."""
    return prompt_batches(_CHUNKS)


def prompt_batches(sizes: Iterable[int]) -> list[Batch]:
    """Steps of one chunk each, of these numbers of tokens."""
    return [Batch([_item(size, _UNREAD)]) for size in sizes]


def worst_batch(max_tokens: int, max_running: int, max_len: int, *, logprobs: bool = True) -> Batch:
    """A step that takes as much as any: decodes with every option, then prompts to the limit."""
    params = _COSTLY if logprobs else _UNREAD
    num_decodes = min(max_running, max(1, max_tokens // 2))
    items = [_item(1, params) for _ in range(num_decodes)]
    left = max_tokens - num_decodes
    while left > 1:
        length = min(left, max_len)
        items.append(_item(length, params))
        left -= length
    return Batch(items)


def _item(length: int, params: SamplingParams) -> BatchItem:
    """A prompt in block 0. A table entry per token is enough for any page size."""
    tokens = [0] * length
    return BatchItem("probe", tokens, 0, [0] * length, True, params, tokens)
