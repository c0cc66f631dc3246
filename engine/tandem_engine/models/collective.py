"""How the ranks of one model add up and exchange what they compute."""

import logging
import os
import threading
from collections.abc import Callable
from typing import Final

import torch
import torch.distributed
from torch.distributed.distributed_c10d import _abort_process_group

from tandem_engine.models.peer_memory import PeerMemory, open_peer_memory
from tandem_engine.models.shard import WHOLE, Shard
from tandem_kernels.norm import add_rms_norm
from tandem_kernels.peer_sum import AddNorm

log = logging.getLogger(__name__)


class Collective:
    """One rank's place in its group. In this class it is alone: every operation is done already.

    All ranks call the same operations in the same order, on tensors of the same shapes.
    """

    def __init__(self, shard: Shard = WHOLE) -> None:
        self.shard = shard

    @property
    def is_alone(self) -> bool:
        """Whether this is the only rank."""
        return self.shard.world_size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that samples, in the scheduler's process."""
        return self.shard.rank == 0

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """Sum x over all ranks, in place; returns x."""
        return x

    def add_norm(self, x: torch.Tensor, norm: AddNorm) -> torch.Tensor:
        """residual += x [T, C] summed over all ranks; returns the norm of it. Overwrites x."""
        return add_rms_norm(
            self.add(x), norm.residual, norm.weight, norm.epsilon, norm.weight_in_float32
        )

    def gather(self, x: torch.Tensor, width: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """The ranks' columns x [R, w] side by side, the first `width` of them: [R, width].

        They go to `out` where it is given. Of a single rank, `x` must be `out` then.
        """
        return x

    def share(self, x: torch.Tensor) -> None:
        """Copy the first rank's x to all others, in place."""

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        return number

    def close(self) -> None:
        """Leave the group. All ranks must do so at about the same time."""

    def abort(self, release: Callable[[], None] | None = None) -> None:
        """Leave a group that has lost a rank: what still waits for that rank ends without a result.

        `release` drops CUDA graphs: a communicator can't end before the graphs that use it.
        """
        if release is not None:
            release()


ALONE: Final = Collective()
_ABORT_SECONDS: Final = 5.0


class GroupCollective(Collective):
    """Ranks in processes of their own, which meet in torch.distributed's default group.

    Args:
        peers: adds up small messages, where the ranks' GPUs see each other's memory.
    """

    def __init__(self, shard: Shard, device: torch.device, peers: PeerMemory | None = None) -> None:
        super().__init__(shard)
        self._device = device
        self._peers = peers

    def add(self, x: torch.Tensor) -> torch.Tensor:
        if self._peers is not None and self._peers.takes(x):
            return self._peers.sum(x)
        torch.distributed.all_reduce(x)
        return x

    def add_norm(self, x: torch.Tensor, norm: AddNorm) -> torch.Tensor:
        if self._peers is not None and self._peers.takes(x) and norm.residual.is_contiguous():
            return self._peers.sum(x, norm)
        return super().add_norm(x, norm)

    def gather(self, x: torch.Tensor, width: int, out: torch.Tensor | None = None) -> torch.Tensor:
        rows, columns = x.shape
        ranks = self.shard.world_size
        gathered = torch.empty((ranks * rows, columns), dtype=x.dtype, device=x.device)
        torch.distributed.all_gather_into_tensor(gathered, x.contiguous())
        if out is None:
            out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
        for rank, part in enumerate(gathered.view(ranks, rows, columns)):
            start = rank * columns
            # Some or all of the last ranks' columns may be padding.
            if (size := min(columns, width - start)) > 0:
                out[:, start : start + size].copy_(part[:, :size])
        return out

    def share(self, x: torch.Tensor) -> None:
        torch.distributed.broadcast(x, src=0)

    def least(self, number: int) -> int:
        smallest = torch.tensor([number], dtype=torch.int64, device=self._device)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        return int(smallest.item())

    def close(self) -> None:
        self._peers = None
        torch.distributed.destroy_process_group()

    def abort(self, release: Callable[[], None] | None = None) -> None:
        if self._device.type == "cpu":
            torch.distributed.destroy_process_group()
            return
        # A failure is to be reported, which no library may hold up. Some have been known to.
        thread = threading.Thread(target=self._abort_device, name="abort", daemon=True)
        thread.start()
        thread.join(_ABORT_SECONDS / 10)  # running steps end, and with them the graphs
        super().abort(release)
        thread.join(_ABORT_SECONDS)
        if thread.is_alive():
            log.error(
                "can't leave the group of ranks: this process can't use %s again", self._device
            )

    def _abort_device(self) -> None:
        torch.cuda.set_device(self._device)
        if self._peers is not None:
            self._peers.abort()
        # Destroying the group would flush it first, for which all ranks are needed.
        _abort_process_group()
        self._peers = None


def join_group(
    shard: Shard, store: str, device: torch.device, hidden_size: int, dtype: torch.dtype
) -> Collective:
    """Meet the other ranks of this machine, through NCCL between GPUs and Gloo between CPUs.

    Returns when all ranks are there. They will add up rows of `hidden_size` elements.

    Args:
        store: path of a file that doesn't exist yet. All ranks must name the same one.
    """
    if shard == WHOLE:
        return ALONE
    on_gpu = device.type == "cuda"
    # All ranks are on this host, so they use no other network.
    os.environ.setdefault("NCCL_SOCKET_IFNAME" if on_gpu else "GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{store}",
        rank=shard.rank,
        world_size=shard.world_size,
        device_id=device if on_gpu else None,
    )
    peers = open_peer_memory(shard, hidden_size, dtype, device) if on_gpu else None
    return GroupCollective(shard, device, peers)
