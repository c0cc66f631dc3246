"""One rank's side of the one-shot sum; what its peers write is already there."""

import pytest
import torch

from tandem_kernels.norm import reference as norm_reference
from tandem_kernels.peer_sum import AddNorm, Layout, kernel, reference

MOST_ROWS = 6


class Ranks:
    """The mailboxes of all ranks on one device; only `rank` runs."""

    def __init__(self, rank: int, ranks: int, size: int, dtype: torch.dtype, device: torch.device):
        self.rank = rank
        self.layout = Layout(ranks, MOST_ROWS, size, dtype)
        self.boxes = [
            torch.zeros(self.layout.num_bytes, dtype=torch.uint8, device=device)
            for _ in range(ranks)
        ]
        self.turns = torch.zeros(MOST_ROWS, dtype=torch.int64, device=device)
        addresses = [box.data_ptr() for box in self.boxes]
        self.mailboxes = torch.tensor(addresses, dtype=torch.int64, device=device)

    def flags(self, rank: int) -> torch.Tensor:
        """[rows, from whom] of a mailbox."""
        flags = self.boxes[rank][: self.layout.slots].view(torch.int64)
        return flags[: MOST_ROWS * self.layout.ranks].view(MOST_ROWS, -1)

    def slots(self, rank: int) -> torch.Tensor:
        """[half, from whom, rows, C] of a mailbox."""
        layout = self.layout
        slots = self.boxes[rank][layout.slots :].view(layout.dtype)
        shape = (2, layout.ranks, MOST_ROWS, layout.block)
        return slots.view(shape)[..., : layout.size]

    def run(self, parts: torch.Tensor, turn: int, norm: AddNorm | None = None) -> torch.Tensor:
        """Sum parts [ranks, rows, C] as the turn with that number."""
        rows = parts.shape[1]
        for peer in range(self.layout.ranks):
            if peer != self.rank:
                self.slots(self.rank)[turn % 2, peer, :rows] = parts[peer]
                self.flags(self.rank)[:rows, peer] = turn
        x = parts[self.rank].clone()
        return kernel.sum_ranks(x, self.mailboxes, self.turns, self.rank, self.layout, norm)


@pytest.mark.parametrize(("rank", "ranks", "size"), [(0, 2, 64), (1, 2, 100), (1, 3, 48)])
def test_sums_in_the_order_of_ranks(
    rank: int, ranks: int, size: int, device: torch.device, half: torch.dtype
) -> None:
    case = Ranks(rank, ranks, size, half, device)
    for turn, rows in ((1, 4), (2, 4), (3, 6)):
        parts = torch.randn(ranks, rows, size, device=device).to(half)
        if rows == 6:  # rows that took no part so far begin with their first turn
            case.turns[:] = turn - 1
        found = case.run(parts, turn)
        assert torch.equal(found, reference.sum_ranks(parts))
        assert case.turns.tolist() == [turn if row < rows else 0 for row in range(MOST_ROWS)]
        for peer in set(range(ranks)) - {rank}:
            assert torch.equal(case.slots(peer)[turn % 2, rank, :rows], parts[rank])
            assert case.flags(peer)[:rows, rank].tolist() == [turn] * rows


@pytest.mark.parametrize("in_float32", [True, False])
def test_the_norm_that_follows(in_float32: bool, device: torch.device, half: torch.dtype) -> None:
    case = Ranks(1, 2, 200, half, device)
    parts = torch.randn(2, 5, 200, device=device).to(half)
    residual, weight = (torch.randn(5, 200, device=device).to(half) for _ in range(2))
    kept = residual.clone()
    found = case.run(parts, 1, AddNorm(residual, weight[0], 1e-6, in_float32))
    summed = reference.sum_ranks(parts)
    expected = norm_reference.add_rms_norm(summed, kept, weight[0], 1e-6, in_float32)
    assert torch.equal(residual, kept)
    assert torch.allclose(found, expected, rtol=5e-3, atol=5e-3)


def test_a_mailbox_has_room_for_two_turns_of_all_ranks() -> None:
    layout = Layout(3, 4, 100, torch.float32)
    assert layout.block == 128
    assert layout.slots == 256  # 4 rows, 3 flags of 8 bytes each
    assert layout.num_bytes == 256 + 2 * 3 * 4 * 128 * 4
