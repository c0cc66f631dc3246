"""What a decode step reads, made on the device from two numbers per sequence.

Tokens that the step before sampled never visit the host on their way into the next step.
"""

import torch

from tandem_kernels.decode_inputs import reference
from tandem_kernels.decode_inputs.reference import DecodeInputs


def fill_inputs(
    staged: torch.Tensor, sampled: torch.Tensor, tables: torch.Tensor, page: int, out: DecodeInputs
) -> None:
    """Fill `out` for the rows of `staged`; see `reference.fill_inputs`."""
    if staged.is_cuda:
        from tandem_kernels.decode_inputs import kernel

        kernel.fill_inputs(staged, sampled, tables, page, out)
    else:
        reference.fill_inputs(staged, sampled, tables, page, out)


__all__ = ["DecodeInputs", "fill_inputs"]
