"""Gathered pages and merged parts against plain torch."""

import pytest
import torch

from tandem_kernels.attention.pages_kernel import gather_pages, merge_parts
from tandem_kernels.tests.paged_case import relative_error


@pytest.mark.parametrize(("heads", "page", "dim"), [(1, 16, 64), (3, 8, 48), (2, 64, 128)])
def test_gather_pages(device, half, heads, page, dim):
    keys, values = torch.randn(2, 40, heads, page, dim, device=device).to(half)
    table = torch.randperm(40, device=device)[:7]
    found = gather_pages(keys, values, table)
    for cache, rows in zip((keys, values), found, strict=True):
        assert torch.equal(rows, cache[table].transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 64), (5, 3, 48), (33, 20, 128)])
def test_merge_parts(device, half, tokens, heads, dim):
    first, second = torch.randn(2, tokens, heads, dim, device=device).to(half)
    lse = 3 * torch.randn(2, heads, tokens, device=device)
    out = torch.full((tokens, heads + 2, dim), float("nan"), dtype=half, device=device)[:, :heads]
    merge_parts(first, lse[0], second, lse[1], out)
    share = lse.double().softmax(0).transpose(1, 2)[..., None]
    expected = share[0] * first.double() + share[1] * second.double()
    assert relative_error(out, expected) < (2e-3 if half == torch.float16 else 1e-2)
