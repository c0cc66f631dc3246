"""Prefill attention on Hopper straight from the pages, with `hopper_kernel`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tandem_kernels.attention.hopper_kernel import hopper_extend_kernel
from tandem_kernels.launch import KNOWS_GLUON, Launcher

_LOG2E: Final = 1.4426950408889634
_BLOCK_M: Final = 128
_TILES: Final = {64: 128, 128: 128, 256: 64}
"""Keys per tile by head dimension: shared memory must hold two tiles of keys and two of values."""

FEWEST_ROWS: Final = 65
"""If no chunk has more than 64 rows, half of each tile is empty and `extend_kernel` is faster."""


@dataclass(frozen=True, slots=True)
class PageRows:
    """One layer's pages as the copy engine sees them: rows [R, D] from the lower of two addresses.

    Making one costs as much as a launch, so it is kept for as long as the pages exist.
    """

    descriptor: Any  # a TensorDescriptor
    key_row: int
    value_row: int
    stride_row: int
    """Rows per block: the pages of its heads, one after the other."""
    page: int


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def suits(key_cache: torch.Tensor, softcap: float | None) -> bool:
    """Whether `describe_pages` and `extend_from_pages` can be used on this device."""
    _, num_heads, page, head_dim = key_cache.shape
    return (
        key_cache.is_cuda
        and KNOWS_GLUON
        and softcap is None
        and head_dim in _TILES
        and page % 64 == 0
        and key_cache.stride() == (num_heads * page * head_dim, page * head_dim, head_dim, 1)
        and key_cache.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(key_cache.device)[0] == 9
    )


def describe_pages(key_cache: torch.Tensor, value_cache: torch.Tensor) -> PageRows:
    """Describe contiguous caches [N, K, P, D], which may lie anywhere in one device's memory."""
    num_blocks, num_heads, page, head_dim = key_cache.shape
    assert key_cache.stride() == value_cache.stride()
    row_bytes = head_dim * key_cache.element_size()
    lower = min((key_cache, value_cache), key=torch.Tensor.data_ptr)
    offsets = [side.data_ptr() - lower.data_ptr() for side in (key_cache, value_cache)]
    assert not any(offset % row_bytes for offset in offsets)
    key_row, value_row = (offset // row_bytes for offset in offsets)
    stride_row = num_heads * page
    rows = max(key_row, value_row) + num_blocks * stride_row
    layout = gl.NVMMASharedLayout(128, 16, 2)
    descriptor = TensorDescriptor(lower, [rows, head_dim], [head_dim, 1], [64, 64], layout)
    return PageRows(descriptor, key_row, value_row, stride_row, page)


def plan_tiles(chunks: Sequence[tuple[int, int]]) -> list[int]:
    """The tiles of rows that `chunks` of (start, rows) need, the longest first.

    Returns:
        Five integers per tile: its chunk; its first row within the chunk; the chunk's first row
        among all rows, its number of rows, and the position of its first row.
    """
    tiles: list[tuple[int, int, int, int, int]] = []
    row_start = 0
    for chunk, (start, rows) in enumerate(chunks):
        tiles += [(chunk, row, row_start, rows, start) for row in range(0, rows, _BLOCK_M)]
        row_start += rows
    tiles.sort(key=lambda tile: -(tile[1] + tile[4]))
    return [number for tile in tiles for number in tile]


_launch = Launcher(hopper_extend_kernel)


def extend_from_pages(
    query: torch.Tensor,
    pages: PageRows,
    block_tables: torch.Tensor,
    tiles: torch.Tensor,
    num_kv_heads: int,
    scale: float,
    window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Several chunks at once, each against its own pages up to the row's own position.

    For what `suits` accepts; the numbers are those of `extend_kernel.paged_extend`.

    Args:
        query: [T, H, D], heads contiguous; the chunks' rows one after the other.
        block_tables: [C, M] int32.
        tiles: [5 · R] int32, by `plan_tiles`.
    """
    num_tokens, num_heads, head_dim = query.shape
    if out is None:
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    assert query.stride(1) == out.stride(1) == head_dim
    num_tiles = num_heads * (tiles.shape[0] // 5)
    programs = min(num_tiles, _multiprocessors(query.device))
    _launch(
        (programs, 1, 1),
        query,
        pages.descriptor,
        block_tables,
        tiles,
        out,
        num_heads,
        num_heads // num_kv_heads,
        num_tiles,
        -(-num_tiles // programs),
        query.stride(0),
        block_tables.stride(0),
        pages.stride_row,
        out.stride(0),
        pages.key_row,
        pages.value_row,
        scale * _LOG2E,
        HEAD_DIM=head_dim,
        PAGE=pages.page,
        WINDOW=window or 0,
        TILE=_TILES[head_dim],
        STAGES=2,
        num_warps=4,
    )
    return out
