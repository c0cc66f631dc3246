"""Gated activation kernels against the reference in float64."""

import pytest
import torch

from tandem_kernels.activation import kernel, reference
from tandem_kernels.tests.paged_case import relative_error


@pytest.mark.parametrize("shape", [(1, 2048), (5, 3, 202), (4, 9000)])
@pytest.mark.parametrize("name", ["silu_and_multiply", "gelu_tanh_and_multiply"])
def test_gated_activations(device: torch.device, shape: tuple[int, ...], name: str) -> None:
    x = torch.randn(shape, device=device) * 4
    out = torch.full((*shape[:-1], shape[-1] // 2), float("nan"), device=device)
    found = getattr(kernel, name)(x, out)
    assert relative_error(found, getattr(reference, name)(x.double())) < 1e-5
