"""KV pages packed or unpacked, and then summed, in plain torch."""

import torch

from tandem_kernels.checksum.reference import checksum_parts
from tandem_kernels.transfer.reference import pack, unpack


def pack_checked(
    cache: torch.Tensor,
    blocks: torch.Tensor,
    layers: range,
    packed: torch.Tensor,
    seed: int | None,
) -> torch.Tensor | None:
    """Write what `pack` returns into `packed`.

    Args:
        cache: pages of a multiple of 8 bytes.
        packed: [words] int64, exactly the room.
        seed: of the checksum; None: without one.

    Returns:
        Parts [n] int64 whose sum modulo 2**64 is the checksum of the packed words.
    """
    packed.copy_(pack(cache, blocks, layers).view(-1).view(torch.int64))
    return None if seed is None else checksum_parts(packed, seed)


def unpack_checked(
    packed: torch.Tensor,
    cache: torch.Tensor,
    blocks: torch.Tensor,
    layers: range,
    seed: int | None,
) -> torch.Tensor | None:
    """Write packed words into the pages of `blocks`; the parts are those of `pack_checked`."""
    shape = (len(layers), cache.shape[1], blocks.shape[0], *cache.shape[3:])
    unpack(packed.view(cache.dtype).view(shape), cache, blocks, layers)
    return None if seed is None else checksum_parts(packed, seed)
