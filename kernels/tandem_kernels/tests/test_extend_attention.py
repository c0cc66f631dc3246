"""Chunked prefill attention with cached prefixes against float64."""

from typing import Any

import pytest
import torch

from tandem_kernels.attention import extend_attention
from tandem_kernels.attention.extend_kernel import paged_extend
from tandem_kernels.tests.paged_case import attend_exactly, make_case, relative_error


def _run(
    device: torch.device,
    chunks: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    page: int,
    dtype: torch.dtype,
    window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> float:
    """`chunks`: (cached prefix, rows)."""
    case = make_case([p + n for p, n in chunks], kv_heads, head_dim, page, dtype, device)
    counts = torch.tensor([0] + [n for _, n in chunks], dtype=torch.int32, device=device)
    row_starts = counts.cumsum(0).int()
    qkv = torch.randn(int(row_starts[-1]), heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    query = qkv[:, :heads]
    out = torch.full(query.shape, float("nan"), dtype=dtype, device=device)
    scale = head_dim**-0.5
    found = paged_extend(
        query,
        case.key_cache,
        case.value_cache,
        case.block_tables,
        torch.tensor([p for p, _ in chunks], dtype=torch.int32, device=device),
        row_starts,
        max(n for _, n in chunks),
        scale,
        window,
        softcap,
        out,
        **options,
    )
    expected = torch.cat(
        [
            attend_exactly(rows, keys, values, prefix, scale, window, softcap)
            for rows, keys, values, (prefix, _) in zip(
                query.split([n for _, n in chunks]), case.keys, case.values, chunks, strict=True
            )
        ]
    )
    return relative_error(found, expected)


CHUNKS = [(0, 1), (0, 70), (130, 65), (63, 2), (200, 33)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page"),
    [(4, 2, 128, 64), (7, 1, 64, 16), (2, 2, 80, 64), (2, 1, 256, 64)],
)
@pytest.mark.parametrize("wide", [True, False])
def test_matches_float64(
    device: torch.device,
    half: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page: int,
    wide: bool,
) -> None:
    dtype = torch.float32 if wide else half
    error = _run(
        device, CHUNKS, heads, kv_heads, head_dim, page, dtype, block_m=64, tile=32, stages=2
    )
    assert error < (1e-5 if wide else 2e-2)


@pytest.mark.parametrize("window", [1, 17, 64, 100, 1000])
def test_window(device: torch.device, window: int | None) -> None:
    options = {"block_m": 64, "tile": 32, "stages": 2}
    assert _run(device, CHUNKS, 2, 1, 64, 16, torch.float32, window, **options) < 1e-5


def test_softcap(device: torch.device) -> None:
    options = {"block_m": 64, "tile": 32, "stages": 2}
    assert _run(device, CHUNKS, 2, 1, 64, 64, torch.float32, None, 1.5, **options) < 1e-5


@pytest.mark.parametrize("tile", [32, 64, 128])
@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_every_tiling_gives_the_same(
    device: torch.device, half: torch.dtype, tile: int, block_m: int
) -> None:
    error = _run(device, CHUNKS, 2, 1, 64, 64, half, tile=tile, block_m=block_m, stages=2)
    assert error < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("prefix", "length"), [(0, 2100), (0, 600), (700, 513), (4100, 4096), (64, 20), (0, 1)]
)
def test_dispatch_on_the_gpu(prefix: int, length: int) -> None:
    device = torch.device("cuda")
    case = make_case([prefix + length], 2, 128, 64, torch.bfloat16, device)
    keys, values = case.key_cache.nan_to_num(), case.value_cache.nan_to_num()
    query = torch.randn(length, 8, 128, device=device, dtype=torch.bfloat16)
    found = extend_attention(query, keys, values, case.block_tables[0].long()[:-1], prefix, 0.1)
    expected = attend_exactly(query, case.keys[0], case.values[0], prefix, 0.1, None, None)
    assert relative_error(found, expected) < 2e-2
