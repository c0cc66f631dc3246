"""Pages into another cache in plain torch, through a gate in plain Python."""

from typing import Final, NamedTuple

import torch

from tandem_kernels.checksum.reference import checksum_parts
from tandem_kernels.transfer.reference import pack, unpack

WORD_BYTES: Final = 8
GENERATION: Final = 1 << 32
"""What the next generation adds to a gate's word; below it stands the count of those inside."""


class PageTarget(NamedTuple):
    """Where pages go: a cache of another process and a gate of it, by their addresses here."""

    address: int
    num_blocks: int
    gate: int
    generation: int


def push_pages(
    cache: torch.Tensor,
    blocks: torch.Tensor,
    target: torch.Tensor,
    target_blocks: torch.Tensor,
    gate: torch.Tensor,
    generation: int,
    layers: range,
    seed: int,
) -> int | None:
    """`target` is the other cache, `gate` [1] its gate; the checksum, or None: not admitted."""
    if int(gate) // GENERATION != generation:
        return None
    packed = pack(cache, blocks, layers)
    unpack(packed, target, target_blocks, layers)
    return int(checksum_parts(packed.view(-1).view(torch.int64), seed))
