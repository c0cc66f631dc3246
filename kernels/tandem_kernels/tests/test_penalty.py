"""Penalties against their definition, one token at a time."""

import pytest
import torch

from tandem_kernels.sampling import penalize, reference
from tandem_kernels.sampling.penalty_kernel import penalize as penalize_kernel


def _case(
    size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    logits = torch.randn(4, size, device=device).to(dtype)
    logits[0, 2] = float("-inf")
    seen = torch.randint(0, 8, (3, size), device=device, dtype=torch.int32)
    seen[:, size // 2 :] = 0
    slots = torch.tensor([2, -1, 0, 1], dtype=torch.int32, device=device)
    return (
        logits,
        seen,
        slots,
        torch.tensor([1.3, 5.0, 1.0, 0.7], device=device),
        torch.tensor([0.0, 5.0, 0.4, -0.5], device=device),
        torch.tensor([0.2, 5.0, 0.0, 0.3], device=device),
    )


def test_reference_is_the_definition() -> None:
    logits, seen, slots, *penalties = _case(30, torch.device("cpu"))
    found, best = reference.penalize(logits, seen, slots, *penalties)
    expected = logits.tolist()
    for row, slot in enumerate(slots.tolist()):
        repetition, frequency, presence = (column[row].item() for column in penalties)
        for token, mark in enumerate(seen[slot].tolist() if slot >= 0 else []):
            value = expected[row][token]
            if mark > 0:
                value = value / repetition if value > 0 else value * repetition
            if mark >= 2:
                value -= frequency * (mark // 2) + presence
            expected[row][token] = value
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)
    assert best.tolist() == found.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "block"), [(30, 4096), (700, 64), (4097, 1024)])
def test_kernel_matches_the_reference(
    device: torch.device, dtype: torch.dtype, size: int, block: int
) -> None:
    case = _case(size, device, dtype)
    kept = case[0].clone()
    found, best = penalize_kernel(*case, block=block)
    expected, _ = reference.penalize(*case)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.gather(1, best[:, None]), found.amax(-1, keepdim=True))
    assert torch.equal(case[0], kept)
    assert penalize(*case)[1].tolist() == best.tolist()
