"""RMS norm kernels against float64."""

import pytest
import torch

from tandem_kernels.norm import kernel, reference
from tandem_kernels.tests.paged_case import relative_error


@pytest.mark.parametrize("shape", [(1, 4096), (3, 5, 100), (7, 640), (2, 1)])
@pytest.mark.parametrize("in_float32", [True, False])
def test_rms_norm(device: torch.device, shape: tuple[int, ...], in_float32: bool) -> None:
    x = torch.randn(shape, device=device)
    weight = torch.randn(shape[-1], device=device)
    out = torch.full_like(x, float("nan"))
    found = kernel.rms_norm(x, weight, 1e-6, in_float32, out)
    expected = reference.rms_norm(x.double(), weight.double(), 1e-6)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("in_float32", [True, False])
def test_add_rms_norm(device: torch.device, half: torch.dtype, in_float32: bool) -> None:
    x = torch.randn(9, 300, device=device).to(half)
    residual = torch.randn(9, 300, device=device).to(half)
    weight = torch.randn(300, device=device).to(half)
    kept = residual.clone()
    out = torch.full_like(x, float("nan"))
    found = kernel.add_rms_norm(x, residual, weight, 1e-6, in_float32, out)
    expected = reference.add_rms_norm(x, kept, weight, 1e-6, in_float32)
    assert torch.equal(residual, kept)
    assert relative_error(found, expected) < 5e-3


def test_a_residual_of_higher_precision(device: torch.device, half: torch.dtype) -> None:
    x = torch.randn(9, 300, device=device).to(half)
    residual = torch.randn(9, 300, device=device) * 1000
    weight = 1 + torch.randn(300, device=device) / 1000
    expected_sum = residual + x
    expected = reference.rms_norm(expected_sum.double(), weight.double(), 1e-6)
    kept = residual.clone()
    out = torch.full_like(x, float("nan"))
    found = kernel.add_rms_norm(x, residual, weight, 1e-6, True, out)
    assert torch.equal(residual, expected_sum)
    assert relative_error(found, expected) < 5e-3
    plain = reference.add_rms_norm(x, kept, weight, 1e-6, True)
    assert torch.equal(kept, expected_sum)
    assert plain.dtype == half
    assert relative_error(plain, expected) < 5e-3


def test_strided_rows(device: torch.device) -> None:
    wide = torch.randn(5, 200, device=device)
    weight = torch.ones(64, device=device)
    found = kernel.rms_norm(wide[:, :64], weight, 1e-6)
    assert relative_error(found, reference.rms_norm(wide[:, :64], weight, 1e-6)) < 1e-5
