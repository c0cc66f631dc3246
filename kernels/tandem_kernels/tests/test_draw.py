"""Sampling without a sort against the reference's partial sort and inverse CDF."""

import pytest
import torch

from tandem_kernels.sampling.draw_kernel import draw
from tandem_kernels.sampling.reference import filter_logits, sample_inverse_cdf, uniform


def _expected(logits, temperature, top_k, top_p, min_p, seeds, positions):
    kept = filter_logits(logits.float() / temperature[:, None], top_k, top_p, min_p)
    draws = [uniform(s & (2**64 - 1), p) for s, p in zip(seeds, positions, strict=True)]
    return sample_inverse_cdf(kept, torch.tensor(draws, dtype=torch.float64))


FILTERS = [
    (0, 1.0, 0.0),
    (5, 1.0, 0.0),
    (0, 0.7, 0.0),
    (0, 1.0, 0.1),
    (40, 0.9, 0.02),
    (1, 0.5, 0.0),
]


@pytest.mark.parametrize("size", [7, 1500])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("few", [16, 2048])
def test_same_tokens_as_the_reference(device, size, top_k, top_p, min_p, few):
    rows = 4 if device.type == "cpu" else 256
    logits = torch.randn(rows, size, device=device) * 3
    logits[:, 1] = float("-inf")
    logits[:, 3] = logits[:, 4]  # ties
    temperature = torch.rand(rows, device=device) + 0.4
    columns = (
        torch.full((rows,), top_k, device=device),
        torch.full((rows,), top_p, device=device),
        torch.full((rows,), min_p, device=device),
    )
    seeds = [(i * 7919 - 5) * (1 << 40) + i for i in range(rows)]
    positions = list(range(rows))
    found = draw(
        logits,
        temperature,
        *columns,
        torch.tensor(seeds, device=device),
        torch.tensor(positions, device=device),
        torch.full((rows,), -1, device=device),
        block=1024 if device.type == "cpu" else 2048,
        capacity=few,
    )
    expected = _expected(
        logits.cpu(), temperature.cpu(), *(c.cpu() for c in columns), seeds, positions
    )
    # A number within rounding of a border may fall on either side of it.
    assert (found.cpu() != expected).sum() <= rows // 100


def test_extreme_logits(device):
    logits = torch.tensor([[1e30, -1e30, 5.0], [-1e5, -1e5 - 1, -1e5], [0.0, 0.0, 0.0]])
    rows = logits.shape[0]
    arguments = (
        torch.ones(rows),
        torch.tensor([2, 0, 1]),
        torch.tensor([0.9, 0.5, 0.3]),
        torch.zeros(rows),
    )
    seeds = torch.arange(rows)
    found = draw(
        logits.to(device), *(a.to(device) for a in arguments), seeds.to(device), seeds.to(device)
    )
    expected = _expected(logits, *arguments, seeds.tolist(), seeds.tolist())
    assert found.cpu().tolist() == expected.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
def test_large_rows(top_k, top_p, min_p):
    device = torch.device("cuda")
    test_same_tokens_as_the_reference(device, 40_000, top_k, top_p, min_p, 8192)
