"""KV pages from one process's cache into another's, in one launch, through a gate of the owner's.

A gate is one 64-bit word of the target's owner, at first of generation 0 with no one inside. Each
program of a launch enters it before its first write and leaves it after its last one; with another
generation than the target's it writes nothing. Once the owner has shut the gate and then seen no
one inside, no launch for an old generation writes a byte any more, whenever it was made or comes to
run.
"""

import torch

from tandem_kernels.page_push.reference import GENERATION, WORD_BYTES, PageTarget


def push_pages(
    cache: torch.Tensor,
    blocks: torch.Tensor,
    target: PageTarget,
    target_blocks: torch.Tensor,
    layers: range,
    job: torch.Tensor,
    *,
    check: bool,
) -> int:
    """Write the pages of `blocks`, for some layers, into the target's blocks.

    Args:
        cache: [L, 2, N, K, P, D], or with one plane; a page has a multiple of 16 bytes. The target
            differs from it in N alone.
        blocks, target_blocks: [n] int64.
        job: [3] int64: two zeros, and the seed of the checksum as a signed number. The first gets
            the checksum of the packed pages, as `checksum` defines it; the second the number of
            programs that were admitted.
        check: whether there is a checksum.

    Returns:
        The number of programs: if fewer were admitted, the gate has been shut.
    """
    from tandem_kernels.page_push import kernel

    return kernel.push_pages(cache, blocks, target, target_blocks, layers, job, check=check)


def sum_pages(cache: torch.Tensor, blocks: torch.Tensor, layers: range, job: torch.Tensor) -> None:
    """Add the checksum of pages, as if they were packed, to the first number of a job [3]."""
    from tandem_kernels.page_push import kernel

    kernel.sum_pages(cache, blocks, layers, job)


def shut_gate(gate: int) -> None:
    """Begin the next generation of the gate at this address, on the current device."""
    from tandem_kernels.page_push import kernel

    kernel.shut_gate(gate)


__all__ = ["GENERATION", "WORD_BYTES", "PageTarget", "push_pages", "shut_gate", "sum_pages"]
