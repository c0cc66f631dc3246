"""Configurations of the linear kernels in Triton: which to try, and the fastest of them."""

from collections.abc import Iterator, Sequence

import torch

from tandem_bench.gpu.device import Ceilings
from tandem_bench.gpu.lines import LineTable
from tandem_bench.kernels.gemm import BITS, LLAMA_8B, GemmBench
from tandem_bench.tune.search import in_processes, keep_best
from tandem_kernels.linear.kernel import GemmTiles, small_linear, with_prefetch
from tandem_kernels.linear.reference import quantize_rows
from tandem_kernels.overlap import is_supported

ROWS = (1, 4, 8, 16, 32, 64)

MATRIX_TILES = [
    (16, 64, 4, 4), (16, 128, 4, 4), (16, 256, 4, 3), (16, 256, 2, 4), (32, 64, 4, 6),
    (32, 128, 4, 4), (32, 128, 4, 6), (32, 256, 4, 3), (64, 64, 4, 5), (64, 128, 4, 3),
    (64, 128, 4, 4), (64, 128, 8, 4), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3),
    (16, 128, 4, 6), (32, 128, 4, 8), (32, 256, 4, 4), (64, 64, 4, 8), (64, 128, 4, 5),
]  # fmt: skip
"""(block_n, block_k, warps, stages)."""

VECTOR_TILES = [
    (4, 512, 2, 1), (4, 1024, 4, 1), (8, 512, 4, 1), (8, 512, 4, 3), (8, 1024, 8, 1),
    (16, 256, 4, 1), (16, 512, 8, 1), (16, 256, 4, 3), (2, 2048, 4, 1), (4, 1024, 4, 3),
    (4, 512, 4, 1), (8, 1024, 4, 1), (2, 4096, 8, 1), (4, 2048, 8, 1), (8, 512, 2, 1),
]  # fmt: skip


def tilings(rows: int) -> list[GemmTiles]:
    """What is worth trying for a number of rows."""
    block_m = max(16, 1 << (rows - 1).bit_length())
    found = [GemmTiles(block_m, *tiles) for tiles in MATRIX_TILES]
    if rows == 1:
        found += [GemmTiles(0, *tiles) for tiles in VECTOR_TILES]
    return [with_prefetch(tiles, rows) for tiles in found]


def fits(tiles: GemmTiles, gate: bool) -> bool:
    """Whether the buffers fit the shared memory (227 KiB), and the sums the registers."""
    columns = tiles.block_n * (2 if gate else 1)
    sums = max(tiles.block_m, 1) * columns
    return (
        tiles.stages * (tiles.block_m + columns) * tiles.block_k * 2 < 220_000
        and sums // (32 * tiles.warps) <= 128
    )


def _compile(job: tuple[str, int, bool, GemmTiles]) -> None:
    bits, rows, gate, tiles = job
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16)
    scale = None
    if bits != "bf16":
        weight, scale = quantize_rows(weight, BITS[bits])
    small_linear(x, weight, scale=scale, gate=gate, tiles=tiles, overlap=is_supported())


def compile_products(bits: str, row_counts: Sequence[int], num_processes: int = 14) -> None:
    """Compile all configurations in parallel."""
    jobs = [
        (bits, rows, gate, tiles)
        for rows in row_counts
        for gate in (False, True)
        for tiles in tilings(rows)
        if fits(tiles, gate)
    ]
    in_processes(_compile, jobs, num_processes)


def tune_products(
    ceilings: Ceilings, table: LineTable, bits: str = "bf16", row_counts: Sequence[int] = ROWS
) -> None:
    """cuBLAS and the best configuration, for each of Llama's shapes and number of rows."""
    compile_products(bits, row_counts)
    for shape in LLAMA_8B:
        bench = GemmBench(shape, bits)
        for rows in row_counts:
            if bits == "bf16":
                table.keep("gemm", bench.run_torch(rows, ceilings))
            chosen: Iterator[GemmTiles] = (t for t in tilings(rows) if fits(t, shape.gate))
            keep_best(table, "gemm", (bench.run(rows, tiles, ceilings) for tiles in chosen))
        del bench
        torch.cuda.empty_cache()
