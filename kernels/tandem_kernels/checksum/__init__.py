"""A checksum of bytes where they are, for pages that go from one GPU to another."""

import torch

from tandem_kernels.checksum import reference


def checksum_parts(words: torch.Tensor, seed: int) -> torch.Tensor:
    """Parts whose sum modulo 2**64 is the checksum that `reference.checksum` defines.

    Args:
        words: [n] int64, contiguous.
        seed: 64 bits.

    Returns:
        [parts] int64, made without waiting for the device.
    """
    if words.is_cuda:
        from tandem_kernels.checksum import kernel

        return kernel.checksum_parts(words, seed)
    return reference.checksum_parts(words, seed)


__all__ = ["checksum_parts"]
