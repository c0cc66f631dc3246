"""argmax over rows: ties go to the lowest id."""

import pytest
import torch

from tandem_kernels.sampling.kernel import greedy


@pytest.mark.parametrize(("rows", "size"), [(1, 5), (3, 4096), (2, 10001)])
def test_greedy(device: torch.device, rows: int, size: int) -> None:
    logits = torch.randn(rows, size, device=device)
    logits[:, size // 2] = logits.max() + 1
    logits[0, size - 1] = logits[0, size // 2]
    assert greedy(logits).tolist() == [size // 2] * rows
