"""The inputs of a decode step, made on the device from two numbers per sequence.

Tokens sampled by one step go into the next without a detour through the host.
"""

import torch

from tandem_kernels.decode_inputs import reference
from tandem_kernels.decode_inputs.reference import DecodeInputs


def fill_inputs(
    staged: torch.Tensor, sampled: torch.Tensor, tables: torch.Tensor, page: int, out: DecodeInputs
) -> None:
    """Fill `out` for the rows of `staged`, whose layout `reference.fill_inputs` describes."""
    if staged.is_cuda:
        from tandem_kernels.decode_inputs import kernel

        kernel.fill_inputs(staged, sampled, tables, page, out)
    else:
        reference.fill_inputs(staged, sampled, tables, page, out)


__all__ = ["DecodeInputs", "fill_inputs"]
