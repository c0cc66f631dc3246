"""Memory on every rank's GPU that all ranks of a group can write to."""

import inspect
import logging
from typing import Any, Final

import torch
import torch.distributed
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from tandem_engine.models.shard import Shard
from tandem_kernels.peer_sum import AddNorm, Layout, sum_ranks

_MOST_BYTES: Final = 4 << 20
"""Most bytes that a rank sends for one sum. It sends each other rank the whole message; NCCL's ring
does not.

Measured on two H200 at up to 2 MiB, where NCCL takes 2.6 times as long with the norm that follows.
"""
_LONGEST_ROW: Final = 16384
"""Most elements of a row: what the registers of one program hold."""

log = logging.getLogger(__name__)


class PeerMemory:
    """Sums over ranks through mailboxes, for messages that fit (`tandem_kernels.peer_sum`).

    Args:
        boxes: every rank's mailbox, as this rank's GPU sees it.
    """

    def __init__(self, rank: int, layout: Layout, boxes: list[torch.Tensor]) -> None:
        self._rank = rank
        self._layout = layout
        self._boxes = boxes
        device = boxes[rank].device
        self._turns = torch.zeros(layout.most_rows, dtype=torch.int64, device=device)
        self._addresses = torch.tensor([box.data_ptr() for box in boxes], device=device)
        # Made now for `abort`: an allocation there might wait for the sums that it is to end.
        self._raised = torch.full((layout.slots,), 0x7F, dtype=torch.uint8, pin_memory=True)
        self._stream = torch.cuda.Stream(device)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x fits. All ranks get the same answer."""
        layout = self._layout
        return (
            x.dtype == layout.dtype
            and x.ndim == 2
            and x.shape[1] == layout.size
            and 0 < x.shape[0] <= layout.most_rows
            and x.is_contiguous()
        )

    def sum(self, x: torch.Tensor, norm: AddNorm | None = None) -> torch.Tensor:
        """Sum x [R, C] over ranks, in place; with `norm`, return the norm of it, a new tensor."""
        return sum_ranks(x, self._addresses, self._turns, self._rank, self._layout, norm)

    def abort(self) -> None:
        """End every sum that waits for a peer, with whatever is in the mailbox."""
        flags = self._boxes[self._rank][: self._layout.slots]
        with torch.cuda.stream(self._stream):
            flags.copy_(self._raised, non_blocking=True)
        self._stream.synchronize()


def open_peer_memory(
    shard: Shard, size: int, dtype: torch.dtype, device: torch.device
) -> PeerMemory | None:
    """Exchange mailboxes for rows of `size` elements. All ranks must do so at the same time.

    Returns None on every rank, and logs why, where a GPU can't write to another GPU's memory.
    """
    row_bytes = (shard.world_size - 1) * size * dtype.itemsize
    layout = Layout(shard.world_size, max(1, _MOST_BYTES // row_bytes), size, dtype)
    own = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    handles: list[tuple[Any, ...] | None] = [None] * shard.world_size
    torch.distributed.all_gather_object(handles, _share(own, shard, size))
    boxes = _map_all(handles, own, shard)
    mapped = torch.tensor([boxes is not None], device=device, dtype=torch.int32)
    # No rank writes before every mailbox is ready.
    torch.distributed.all_reduce(mapped, torch.distributed.ReduceOp.MIN)
    if boxes is None or not mapped.item():
        log.warning(
            "the ranks' GPUs can't share memory, so NCCL adds up small messages too (slower)"
        )
        return None
    return PeerMemory(shard.rank, layout, boxes)


def _share(box: torch.Tensor, shard: Shard, size: int) -> tuple[Any, ...] | None:
    """The handle by which other processes map a mailbox; None if they can't."""
    index = box.device.index
    others = [rank for rank in range(shard.world_size) if rank != index]
    if size > _LONGEST_ROW or not all(
        torch.cuda.can_device_access_peer(index, other) for other in others
    ):
        return None
    try:
        handle: tuple[Any, ...] = reduce_tensor(box)[1]
    except RuntimeError as error:  # from CUDA, or from an allocator that can't share
        log.warning("can't share this rank's mailbox: %s", error)
        return None
    return handle


def _map_all(
    handles: list[tuple[Any, ...] | None], own: torch.Tensor, shard: Shard
) -> list[torch.Tensor] | None:
    """Every rank's mailbox; None if one can't be shared or mapped."""
    boxes = []
    for rank, handle in enumerate(handles):
        if rank == shard.rank:
            boxes.append(own)
            continue
        if handle is None:
            return None
        try:
            boxes.append(_map(handle, own.device))
        except RuntimeError as error:
            log.warning("can't map the mailbox of rank %d: %s", rank, error)
            return None
    return boxes


def _map(handle: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    """A peer's tensor as `device` sees it: CUDA maps any GPU's memory for the current one."""
    call = inspect.signature(rebuild_cuda_tensor).bind(*handle)
    call.arguments["storage_device"] = device.index
    call.arguments["event_sync_required"] = False  # its zeros were there before it was shared
    mapped: torch.Tensor = rebuild_cuda_tensor(*call.args)
    return mapped
