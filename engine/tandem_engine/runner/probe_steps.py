"""Steps made up before there are requests: to compile kernels with, and to measure memory with.

All of it reads and writes the first block alone, so the results mean nothing.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from tandem_engine.step import Batch, BatchItem
from tandem_wire.messages import SamplingParams

_CHUNKS: Final = (2, 17, 33, 65, 129)
"""Chunks of so many tokens take each of attention's tile heights."""
_COSTLY: Final = SamplingParams(
    max_tokens=1, temperature=1.0, top_p=0.9, presence_penalty=0.5, logprobs=5
)
_UNREAD: Final = msgspec.structs.replace(_COSTLY, logprobs=None)
"""Logprobs are looked up by the chosen tokens, which must be real for that."""


def small_batches() -> list[Batch]:
    """Steps of one chunk each, which between them take all of attention's configurations."""
    return prompt_batches(_CHUNKS)


def prompt_batches(sizes: Iterable[int]) -> list[Batch]:
    """Steps of one chunk each, of so many tokens."""
    return [Batch([_item(size, _UNREAD)]) for size in sizes]


def worst_batch(max_tokens: int, max_running: int, max_len: int, *, logprobs: bool = True) -> Batch:
    """A step as large as any: decodes with every extra, and prompts that fill the rest."""
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
    """A prompt of so many tokens in block 0, which one block table entry per token covers."""
    tokens = [0] * length
    return BatchItem("probe", tokens, 0, [0] * length, True, params, tokens)
