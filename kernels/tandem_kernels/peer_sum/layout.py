"""Where ranks leave their rows for each other, and what follows a sum."""

from dataclasses import dataclass
from typing import Final

import torch

_FLAG_BYTES: Final = 8
_ALIGNMENT: Final = 256


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of every rank's mailbox.

    Args:
        ranks: the number of ranks.
        most_rows: the most rows of one sum.
        size: the elements of a row.
    """

    ranks: int
    most_rows: int
    size: int
    dtype: torch.dtype

    @property
    def block(self) -> int:
        """The elements of a slot."""
        return 1 << (self.size - 1).bit_length()

    @property
    def slots(self) -> int:
        """The bytes before the slots, which the flags take."""
        flags = self.most_rows * self.ranks * _FLAG_BYTES
        return -(-flags // _ALIGNMENT) * _ALIGNMENT

    @property
    def num_bytes(self) -> int:
        """The bytes of a mailbox. Its flags begin as zeros."""
        return self.slots + 2 * self.ranks * self.most_rows * self.block * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class AddNorm:
    """What follows the sum: residual += sum, then its RMS norm, as in `norm.add_rms_norm`."""

    residual: torch.Tensor
    weight: torch.Tensor
    epsilon: float
    weight_in_float32: bool
