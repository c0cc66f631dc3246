"""Packing and unpacking with a checksum against the two by themselves."""

import pytest
import torch

from tandem_kernels.checked_transfer import reference
from tandem_kernels.checked_transfer.kernel import CheckedMover
from tandem_kernels.checksum.reference import MASK, checksum
from tandem_kernels.transfer import reference as transfer


def total(parts: torch.Tensor | None) -> int:
    assert parts is not None
    numbers: list[int] = parts.tolist()
    return sum(numbers) & MASK


@pytest.mark.parametrize("seed", [None, 0, (1 << 63) + 12345, MASK])
@pytest.mark.parametrize("shape", [(4, 2, 9, 3, 16, 8), (2, 2, 5, 4, 6, 7), (3, 1, 9, 4, 4, 20)])
def test_pack_and_unpack_with_a_checksum(
    device: torch.device, half: torch.dtype, shape: tuple[int, ...], seed: int | None
) -> None:
    """Of both ways: the pages, and the sum of the words that were moved. Twice: found again."""
    cache = torch.randn(shape, device=device).to(half)
    target = torch.full_like(cache, 7.0)
    mover, back = CheckedMover(cache, piece=32), CheckedMover(target, piece=32)
    for some, first in (([3, 0, 4], 1), ([1, 2], 0)):
        blocks, layers = torch.tensor(some, device=device), range(first, shape[0])
        plain = transfer.pack(cache, blocks, layers)
        words = plain.view(-1).view(torch.int64)
        count = mover.num_parts(len(some), layers)
        assert count == plain.shape[:3].numel()
        packed = torch.full_like(words, -1)
        parts = torch.full((count + 1,), -1, device=device)
        mover.move(packed, blocks, len(some), layers, parts, seed, pack=True)
        assert torch.equal(packed, words)
        expected = None if seed is None else checksum(words.tolist(), seed)
        for _ in range(2):
            assert parts[count] == -1
            if expected is None:
                assert bool((parts == -1).all())
            else:
                assert total(parts[:count]) == expected
            parts[:count] = -1
            caches = target.clone(), target.clone()
            back.move(packed, blocks, len(some), layers, parts, seed, pack=False)
            transfer.unpack(plain, caches[0], blocks, layers)
            assert torch.equal(target, caches[0])
        checked = reference.pack_checked(cache, blocks, layers, torch.empty_like(words), seed)
        assert expected == (None if checked is None else total(checked))
        checked = reference.unpack_checked(packed, caches[1], blocks, layers, seed)
        assert expected == (None if checked is None else total(checked))
        assert torch.equal(caches[1], target)


def test_preparing_changes_nothing(device: torch.device) -> None:
    cache = torch.randn(2, 2, 3, 1, 4, 4, device=device)
    before = cache.clone()
    CheckedMover(cache).prepare()
    assert torch.equal(cache, before)


def test_no_pages_are_no_launch(device: torch.device) -> None:
    mover = CheckedMover(torch.randn(2, 2, 3, 1, 4, 4, device=device))
    none = torch.empty(0, dtype=torch.int64, device=device)
    mover.move(none, none, 0, range(2), none, 5, pack=True)
    assert mover.num_parts(0, range(2)) == 0


@pytest.mark.gpu
def test_in_a_stream_with_numbers_and_parts_in_the_hosts_memory() -> None:
    """As the hand-off does it; the second time by the code that is known."""
    cache = torch.randn(3, 2, 9, 4, 16, 64, device="cuda")
    mover, stream, layers = CheckedMover(cache), torch.cuda.Stream(), range(1, 3)
    blocks = torch.zeros(16, dtype=torch.int64).pin_memory()
    parts = torch.zeros(64, dtype=torch.int64).pin_memory()
    for some in ([3, 0, 4], [8, 1, 2, 5]):
        blocks[: len(some)] = torch.tensor(some)
        words = transfer.pack(cache, blocks[: len(some)].cuda(), layers).view(-1).view(torch.int64)
        packed = torch.zeros_like(words)
        torch.cuda.synchronize()
        mover.move(
            packed, blocks, len(some), layers, parts, 9, pack=True, stream=stream.cuda_stream
        )
        stream.synchronize()
        assert torch.equal(packed, words)
        found = total(parts[: mover.num_parts(len(some), layers)])
        assert found == checksum(words.tolist(), 9)
    assert len(mover._known) == 1
    mover.prepare()
    assert len(mover._known) == 4
