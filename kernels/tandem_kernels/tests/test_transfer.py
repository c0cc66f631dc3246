"""Packing and unpacking KV pages against indexing."""

import pytest
import torch

from tandem_kernels.transfer import kernel, reference


@pytest.mark.parametrize("heads", [None, range(1, 3), range(0, 1)])
@pytest.mark.parametrize("shape", [(4, 2, 9, 3, 16, 8), (2, 2, 5, 4, 5, 7), (3, 1, 9, 4, 4, 20)])
def test_pack_and_unpack(device: torch.device, heads: range | None, shape: tuple[int, ...]) -> None:
    cache = torch.randn(shape, device=device)
    blocks = torch.tensor([3, 0, 4], device=device)
    layers = range(1, shape[0])
    expected = reference.pack(cache, blocks, layers, heads)
    found = kernel.pack(
        cache, blocks, layers, heads, torch.full_like(expected, float("nan")), piece=64
    )
    assert torch.equal(found, expected)
    caches = [torch.full_like(cache, 7.0) for _ in range(2)]
    kernel.unpack(expected, caches[0], blocks, layers, heads, piece=64)
    reference.unpack(expected, caches[1], blocks, layers, heads)
    assert torch.equal(*caches)


def test_nothing_to_move(device: torch.device) -> None:
    cache = torch.randn(2, 2, 3, 1, 4, 4, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert kernel.pack(cache, none, range(2)).shape == (2, 2, 0, 1, 4, 4)
