"""Sampling without a sort against the reference's partial sort and inverse CDF."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tandem_kernels.sampling.draw_kernel import draw
from tandem_kernels.sampling.reference import filter_logits, sample_inverse_cdf, uniform


def _expected(
    logits: torch.Tensor, columns: Sequence[torch.Tensor], seeds: list[int], positions: list[int]
) -> torch.Tensor:
    """The reference's draws for columns of temperature, top-k, top-p and min-p."""
    temperature, top_k, top_p, min_p = columns
    kept = filter_logits(logits.float() / temperature[:, None], top_k, top_p, min_p)
    draws = [uniform(s & (2**64 - 1), p) for s, p in zip(seeds, positions, strict=True)]
    return sample_inverse_cdf(kept, torch.tensor(draws, dtype=torch.float64))


def _compare(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
    **options: Any,
) -> tuple[torch.Tensor, int]:
    """Draws of one token per row, and how many of them differ from the reference's."""
    rows, device = logits.shape[0], logits.device
    columns = (
        temperature,
        torch.full((rows,), top_k, device=device),
        torch.full((rows,), top_p, device=device),
        torch.full((rows,), min_p, device=device),
    )
    seeds = [(i * 7919 % (1 << 22) - 5) * (1 << 40) + i for i in range(rows)]
    positions = list(range(rows))
    found = draw(
        logits,
        *columns,
        torch.tensor(seeds, device=device),
        torch.tensor(positions, device=device),
        torch.full((rows,), -1, device=device),
        **options,
    )
    expected = _expected(logits.cpu(), [c.cpu() for c in columns], seeds, positions)
    return found.cpu(), int((found.cpu() != expected).sum())


FILTERS = [
    (0, 1.0, 0.0),
    (5, 1.0, 0.0),
    (0, 0.7, 0.0),
    (0, 1.0, 0.1),
    (40, 0.9, 0.02),
    (300, 0.95, 0.0),
    (20, 0.99, 0.3),
    (1, 0.5, 0.0),
    (0, 0.0, 0.0),
]


@pytest.mark.parametrize(("size", "block"), [(7, 4096), (1500, 4096)])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
def test_odd_sizes(size: int, block: int, top_k: int, top_p: float, min_p: float) -> None:
    """Under the interpreter alone: every size is another compilation on a GPU."""
    torch.manual_seed(7)
    temperature = torch.rand(4) + 0.4
    for capacity in (3, 2048):
        options = {"block": block, "capacity": capacity}
        logits = torch.randn(4, size) * 3
        _, different = _compare(logits, temperature, top_k, top_p, min_p, **options)
        assert different == 0


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("capacity", [16, 2048])
def test_same_tokens_as_the_reference(
    device: torch.device, top_k: int, top_p: float, min_p: float, capacity: int
) -> None:
    rows, size = 4 if device.type == "cpu" else 256, 1500
    logits = torch.randn(rows, size, device=device) * 3
    logits[:, 1] = float("-inf")
    logits[:, 3] = logits[:, 4]  # ties
    temperature = torch.rand(rows, device=device) + 0.4
    options = {"block": 256, "capacity": capacity}
    _, different = _compare(logits, temperature, top_k, top_p, min_p, **options)
    # A number within rounding of a border may fall on either side of it.
    assert different <= rows // 100


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("spread", [0.001, 0.01, 0.3])
def test_flat_rows_are_cut_twice(
    device: torch.device, spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    """More values between the first bounds than may be collected, fewer between the second."""
    rows = 4 if device.type == "cpu" else 256
    logits = torch.randn(rows, 1500, device=device) * spread
    temperature = torch.ones(rows, device=device)
    _, different = _compare(logits, temperature, top_k, top_p, min_p, block=256, capacity=64)
    assert different <= rows // 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
def test_short_logits_with_many_ties(
    device: torch.device, dtype: torch.dtype, top_k: int, top_p: float, min_p: float
) -> None:
    rows = 4 if device.type == "cpu" else 256
    logits = torch.randn(rows, 1500, device=device).to(dtype)
    temperature = torch.full((rows,), 0.5, device=device)
    searched = top_k > 0 or top_p < 1.0
    options = {"block": 256, "searched": searched}
    _, different = _compare(logits, temperature, top_k, top_p, min_p, **options)
    assert different <= rows // 100


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("capacity", [16, 2048])
def test_rows_of_few_values(
    device: torch.device, top_k: int, top_p: float, min_p: float, capacity: int
) -> None:
    """All equal, both zeros, one finite value, one far above the others, two equal ones."""
    logits = torch.zeros(5, 1500)
    logits[1, ::2] = -0.0
    logits[2] = float("-inf")
    logits[2, 417] = -3.0
    logits[3, 1499] = 500.0
    logits[4, 100:102] = 40.0
    temperature = torch.ones(5, device=device)
    options = {"block": 256, "capacity": capacity}
    found, different = _compare(logits.to(device), temperature, top_k, top_p, min_p, **options)
    assert different == 0
    assert found[2] == 417


def test_given_best_and_nothing_finite(device: torch.device) -> None:
    """The argmax may be known; a row of nothing still yields a token of the vocabulary."""
    logits = torch.randn(3, 1500, device=device)
    logits[1] = float("-inf")
    temperature = torch.full((3,), 0.7, device=device)
    best = logits.argmax(-1)
    found, _ = _compare(logits, temperature, 9, 0.9, 0.1, best=best, block=256)
    again, _ = _compare(logits, temperature, 9, 0.9, 0.1, block=256)
    assert found.tolist() == again.tolist()
    assert bool(((found >= 0) & (found < 1500)).all())


@pytest.mark.parametrize("capacity", [16, 2048])
def test_draws_exactly_the_kept_tokens(device: torch.device, capacity: int) -> None:
    """Many seeds over one row: every token that is kept, ties with the last one too, no other."""
    row = torch.randn(1, 1500) * 0.3
    row[0, 100:120] = 2.0
    row[0, 500:505] = 2.5
    rows = 64 if device.type == "cpu" else 2048
    logits = row.expand(rows, -1).contiguous().to(device)
    temperature = torch.ones(rows, device=device)
    options = {"block": 256, "capacity": capacity}
    found, different = _compare(logits, temperature, 6, 1.0, 0.0, **options)
    assert different == 0
    allowed = set(range(100, 120)) | set(range(500, 505))
    assert set(found.tolist()) <= allowed
    if rows > 1000:
        assert set(found.tolist()) == allowed


def test_extreme_logits(device: torch.device) -> None:
    logits = torch.tensor([[1e30, -1e30, 5.0], [-1e5, -1e5 - 1, -1e5], [0.0, 0.0, 0.0]])
    rows = logits.shape[0]
    arguments = (
        torch.ones(rows),
        torch.tensor([2, 0, 1]),
        torch.tensor([0.9, 0.5, 0.3]),
        torch.zeros(rows),
    )
    seeds = torch.arange(rows)
    temperature, top_k, top_p, min_p = (column.to(device) for column in arguments)
    seeds = seeds.to(device)
    found = draw(logits.to(device), temperature, top_k, top_p, min_p, seeds, seeds)
    expected = _expected(logits, arguments, seeds.tolist(), seeds.tolist())
    assert found.cpu().tolist() == expected.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_large_rows(top_k: int, top_p: float, min_p: float, spread: float) -> None:
    logits = torch.randn(256, 40_000, device="cuda") * spread
    temperature = torch.rand(256, device="cuda") + 0.4
    _, different = _compare(logits, temperature, top_k, top_p, min_p)
    # The reference sums a flat row's tens of thousands of tokens in float32 to find top-p's last.
    assert different <= (2 if spread == 3.0 or top_p == 1.0 else 8)
