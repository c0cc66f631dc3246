"""Linear layers for few rows against the reference in float64."""

import pytest
import torch

from tandem_kernels.linear import kernel, reference, wide_linear
from tandem_kernels.linear.kernel import GemmTiles
from tandem_kernels.tests.paged_case import relative_error

SHAPES = [(1, 96, 256), (1, 50, 200), (3, 130, 512), (17, 33, 136), (64, 64, 128), (100, 64, 128)]


@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("bits", [16, 8])
def test_small_linear(
    device: torch.device,
    half: torch.dtype,
    rows: int,
    columns: int,
    size: int,
    gate: bool,
    bits: int,
) -> None:
    x = torch.randn(rows, size, device=device).to(half)
    weight = torch.randn(columns * (2 if gate else 1), size, device=device).to(half)
    bias = None if gate else torch.randn(columns, device=device).to(half)
    scale = None
    if bits == 8:
        weight, scale = reference.quantize_rows(weight)
    out = torch.full((rows, columns), float("nan"), dtype=half, device=device)
    tiles = GemmTiles(0 if rows == 1 else max(16, 1 << (rows - 1).bit_length()), 16, 64, 4, 2)
    found = kernel.small_linear(x, weight, bias, scale=scale, gate=gate, out=out, tiles=tiles)
    wide = weight.double() if scale is None else weight.double() * scale.double()[:, None]
    if gate:
        expected = reference.gated_linear(x.double(), wide)
    else:
        assert bias is not None
        expected = reference.linear(x.double(), wide, bias.double())
    assert relative_error(found, expected) < 1e-2


@pytest.mark.parametrize("rows", [1, 3])
def test_sums_are_not_rounded_for_float32(
    device: torch.device, half: torch.dtype, rows: int
) -> None:
    x = torch.randn(rows, 136, device=device).to(half)
    weight = torch.randn(50, 136, device=device).to(half)
    out = torch.full((rows, 50), float("nan"), device=device)
    tiles = GemmTiles(0 if rows == 1 else 16, 16, 64, 4, 2)
    kernel.small_linear(x, weight, out=out, tiles=tiles)
    assert relative_error(out, reference.linear(x.double(), weight.double())) < 1e-5


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_wide_linear(device: torch.device, half: torch.dtype, rows: int) -> None:
    x = torch.randn(rows, 136, device=device).to(half)
    weight = torch.randn(50, 136, device=device).to(half)
    out = torch.full((rows, 50), float("nan"), device=device)
    found = wide_linear(x, weight)
    assert found.dtype == torch.float32
    expected = reference.linear(x.double(), weight.double())
    assert relative_error(found, expected) < (1e-5 if found.is_cuda else 1e-2)
    assert torch.equal(wide_linear(x, weight, out), found)
    assert torch.equal(out, found)
    wide = wide_linear(x.float(), weight.float())
    assert relative_error(wide, expected) < (1e-2 if found.is_cuda else 1e-5)


@pytest.mark.parametrize(
    ("tuned", "rows", "expected"),
    [
        (None, 64, GemmTiles(64, 32, 128, 4, 4)),
        (None, 65, None),
        ([], 8, None),
        ([16, 32, 128, 4, 6], 8, GemmTiles(16, 32, 128, 4, 6, prefetch=1)),
        ([0, 4, 512, 2, 1], 1, GemmTiles(0, 4, 512, 2, 1, prefetch=8)),
        ([0, 4, 512, 2, 1, 2], 1, GemmTiles(0, 4, 512, 2, 1, prefetch=2)),
    ],
)
def test_what_the_table_has_is_chosen(
    tuned: list[int] | None,
    rows: int,
    expected: GemmTiles | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "tuned_gemm", lambda *shape: tuned)
    assert kernel.choose_tiles(rows, 4096, 4096, gate=False) == expected
