"""Sums over ranks through memory that peers can write to, for messages that take microseconds.

Only GPUs have such memory. `reference.sum_ranks` defines the result.
"""

import torch

from tandem_kernels.peer_sum.layout import AddNorm, Layout


def sum_ranks(
    x: torch.Tensor,
    mailboxes: torch.Tensor,
    turns: torch.Tensor,
    rank: int,
    layout: Layout,
    norm: AddNorm | None = None,
) -> torch.Tensor:
    """The sum of x [R, C] over all ranks, in place; with `norm`, the normed sum in a new tensor.

    All ranks run this at the same time, with the same shapes, each in one stream.

    Args:
        mailboxes: [ranks] int64, the address of each rank's mailbox as this rank sees it.
        turns: [most_rows] int64, this rank's own, initially zeros.
    """
    from tandem_kernels.overlap import is_supported
    from tandem_kernels.peer_sum import kernel

    return kernel.sum_ranks(x, mailboxes, turns, rank, layout, norm, overlap=is_supported())


__all__ = ["AddNorm", "Layout", "sum_ranks"]
