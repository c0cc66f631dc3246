"""The checksum of bytes: kernel and torch against plain Python, and what it must find."""

import pytest
import torch

from tandem_kernels.checksum import kernel, reference
from tandem_kernels.checksum.reference import MASK

SEEDS = [0, 1, (1 << 63) + 12345, MASK]


def total(parts: torch.Tensor) -> int:
    numbers: list[int] = parts.tolist()
    return sum(numbers) & MASK


def random_words(count: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-(1 << 62), 1 << 62, (count,), device=device) * 2 + 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
def test_all_ways_agree(device: torch.device, count: int, seed: int) -> None:
    words = random_words(count, device)
    expected = reference.checksum(words.tolist(), seed)
    assert total(reference.checksum_parts(words, seed)) == expected
    assert total(kernel.checksum_parts(words, seed, block=64)) == expected


def test_several_rounds(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_MOST_PROGRAMS", 3)
    words = random_words(1000, device)
    parts = kernel.checksum_parts(words, 7, block=64)
    assert parts.shape == (3,)
    assert total(parts) == reference.checksum(words.tolist(), 7)


def test_what_it_finds(device: torch.device) -> None:
    """A flipped bit anywhere, zeros, words that changed places, another seed, fewer words."""
    words = random_words(300, device)
    right = total(kernel.checksum_parts(words, 5, block=64))
    changed = []
    for word, bit in ((0, 0), (299, 63), (150, 31)):
        flipped = words.clone()
        flipped[word] ^= -(1 << 63) if bit == 63 else 1 << bit
        changed.append((flipped, 5))
    swapped = words.clone()
    swapped[[3, 200]] = words[[200, 3]]
    changed += [(swapped, 5), (torch.zeros_like(words), 5), (words, 6), (words[:299], 5)]
    rolled = words.roll(64)
    changed.append((rolled, 5))
    found = [total(kernel.checksum_parts(some, seed, block=64)) for some, seed in changed]
    assert right not in found
    assert len(set(found)) == len(found)


@pytest.mark.gpu
def test_of_more_than_four_gigabytes_of_words_on_a_gpu() -> None:
    """Offsets are of 64 bits."""
    words = torch.zeros(540_000_000, dtype=torch.int64, device="cuda")
    words[-1] = 1
    half = total(kernel.checksum_parts(words, 3))
    words[-1] = 2
    assert total(kernel.checksum_parts(words, 3)) != half
