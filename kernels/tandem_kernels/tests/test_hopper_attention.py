"""Prefill attention from pages on Hopper: the plan is tested anywhere, the kernel only on a GPU."""

import pytest
import torch

from tandem_kernels.attention.hopper_extend import (
    describe_pages,
    extend_from_pages,
    plan_tiles,
    suits,
)
from tandem_kernels.tests.paged_case import attend_exactly, make_case, relative_error

NAN = float("nan")


def test_every_row_is_in_one_tile() -> None:
    chunks = [(63, 2), (0, 300), (1000, 129), (5, 128)]
    numbers = plan_tiles(chunks)
    tiles = [numbers[at : at + 5] for at in range(0, len(numbers), 5)]
    row_starts = [0, 2, 302, 431]
    assert sorted(tile[:2] for tile in tiles) == [
        [chunk, first] for chunk, (_, rows) in enumerate(chunks) for first in range(0, rows, 128)
    ]
    for chunk, _, row_start, rows, start in tiles:
        assert (row_start, start, rows) == (row_starts[chunk], *chunks[chunk])
    work = [first + start for _, first, _, _, start in tiles]
    assert work == sorted(work, reverse=True)


def test_it_suits_no_cpu() -> None:
    assert not suits(torch.zeros(2, 1, 64, 128, dtype=torch.bfloat16), None)


def test_pages_are_found_whichever_side_lies_first() -> None:
    cache = torch.zeros(2, 3, 2, 64, 128, dtype=torch.bfloat16)
    pages = describe_pages(cache[0], cache[1])
    assert (pages.key_row, pages.value_row, pages.stride_row) == (0, 3 * 2 * 64, 2 * 64)
    assert pages.descriptor.shape == [2 * 3 * 2 * 64, 128]
    pages = describe_pages(cache[1], cache[0])
    assert (pages.key_row, pages.value_row) == (3 * 2 * 64, 0)


def _run(
    chunks: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    page: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    head_dim: int = 128,
    scale: float | None = None,
) -> float:
    """`chunks`: (cached prefix, rows). Nothing behind the output's rows may be written."""
    torch.manual_seed(5)
    device = torch.device("cuda")
    case = make_case([p + n for p, n in chunks], kv_heads, head_dim, page, dtype, device)
    sizes = [n for _, n in chunks]
    total, scale = sum(sizes), scale or head_dim**-0.5
    qkv = torch.randn(total, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    query = qkv[:, :heads]
    memory = torch.full((total + 200, heads, head_dim), NAN, dtype=dtype, device=device)
    assert suits(case.key_cache, None)
    tiles = torch.tensor(plan_tiles(chunks), dtype=torch.int32, device=device)
    pages = describe_pages(case.key_cache, case.value_cache)
    out = memory[:total]
    extend_from_pages(query, pages, case.block_tables, tiles, kv_heads, scale, window, out)
    assert memory[total:].isnan().all()
    expected = torch.cat(
        [
            attend_exactly(rows, keys, values, prefix, scale, window, None)
            for rows, keys, values, (prefix, _) in zip(
                query.split(sizes), case.keys, case.values, chunks, strict=True
            )
        ]
    )
    return relative_error(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 1000, 4097])
@pytest.mark.parametrize("prefix", [0, 100, 2048])
def test_one_chunk(prefix: int, length: int) -> None:
    assert _run([(prefix, length)], 4, 1) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 8), (8, 2), (28, 4), (32, 4), (7, 1)])
@pytest.mark.parametrize("page", [64, 128])
def test_many_chunks(heads: int, kv_heads: int, page: int) -> None:
    chunks = [(63, 2), (1000, 1), (0, 577), (130, 65), (200, 33), (64, 64), (0, 128), (999, 300)]
    assert _run(chunks, heads, kv_heads, page=page) < 2e-2


@pytest.mark.gpu
def test_more_tiles_than_programs() -> None:
    assert _run([(37 * i, 100 + 41 * i) for i in range(16)], 32, 8) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 100, 128, 300, 5000])
def test_window(window: int | None) -> None:
    assert _run([(10, 700), (0, 577), (900, 3)], 8, 2, window=window) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("page", [64, 256])
def test_half_precision(page: int) -> None:
    chunks = [(10, 700), (0, 577), (900, 3)]
    assert _run(chunks, 8, 2, page=page, dtype=torch.float16) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("scale", [0.1, 0.0625, 0.05, 1.0])
def test_scales(head_dim: int, scale: float) -> None:
    """Rows that see nothing of the first tile of keys: what hides it is scaled, and rounded."""
    chunks = [(700, 513), (4100, 700), (0, 130)]
    assert _run(chunks, 8, 2, head_dim=head_dim, scale=scale) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("window", [None, 1, 64, 100, 700])
def test_head_dims(head_dim: int, page: int, window: int | None) -> None:
    chunks = [(63, 2), (1000, 1), (0, 577), (130, 65), (200, 33), (64, 64), (0, 128), (999, 300)]
    assert _run(chunks, 6, 2, page=page, window=window, head_dim=head_dim) < 2e-2
