"""Try every configuration of every kernel, print the best ones, write all of it as JSON."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import triton

from tandem_kernels.bench.attention import (
    DECODE_CASES,
    DecodeBench,
    DecodeTiles,
    run_prefill,
)
from tandem_kernels.bench.gemm import BITS, LLAMA_8B, GemmBench, fits, tilings
from tandem_kernels.bench.memory import SAMPLING_TILES, run_penalties, run_sampling, run_transfer
from tandem_kernels.bench.record import begin, write_lines
from tandem_kernels.bench.rows import run_activation, run_norm, run_rope
from tandem_kernels.bench.timing import Ceilings, Line
from tandem_kernels.linear.kernel import GemmTiles, small_linear
from tandem_kernels.linear.reference import quantize_rows
from tandem_kernels.overlap import is_supported

ROWS = (1, 4, 8, 16, 32, 64)
DECODE_TILES = [(32, 4, 4), (32, 4, 6), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 3), (128, 4, 2),
                (128, 8, 2), (128, 8, 3), (64, 2, 3)]  # fmt: skip
PREFILL_TILES = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3),
                 (64, 64, 4, 3), (128, 32, 8, 4), (64, 128, 4, 2), (256, 64, 8, 2)]  # fmt: skip


def _compile_gemm(job: tuple[str, int, bool, GemmTiles]) -> None:
    """In a process of its own: fill Triton's cache on disk."""
    bits, rows, gate, tiles = job
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16)
    scale = None
    if bits != "bf16":
        weight, scale = quantize_rows(weight, BITS[bits])
    small_linear(x, weight, scale=scale, gate=gate, tiles=tiles, overlap=is_supported())


def compile_all(bits: str, row_counts: Sequence[int], processes: int = 14) -> None:
    """Compile the matrix products' configurations in parallel."""
    jobs = [
        (bits, rows, gate, t)
        for rows in row_counts
        for gate in (False, True)
        for t in tilings(rows)
        if fits(t, gate)
    ]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(_compile_gemm, jobs))


def best_of(lines: list[Line]) -> Line:
    """The fastest."""
    return min(lines, key=lambda line: line.seconds)


def tune_decode(ceilings: Ceilings, log: Callable[[Line], None]) -> list[Line]:
    """Every case's best configuration."""
    found = []
    for case in DECODE_CASES:
        bench = DecodeBench(case)
        expected = bench.expected()
        lines = []
        for tile, warps, stages in DECODE_TILES:
            for programs in (132, 264, 528, 1056, 2112):
                try:
                    tiles = DecodeTiles(tile, warps, stages, programs)
                    lines.append(bench.run(tiles, expected, ceilings))
                except triton.runtime.errors.OutOfResources:
                    break
                log(lines[-1])
        found.append(best_of(lines))
        print(found[-1].show(), flush=True)
        del bench
        torch.cuda.empty_cache()
    return found


def tune_gemm(
    ceilings: Ceilings,
    log: Callable[[Line], None],
    bits: str = "bf16",
    row_counts: Sequence[int] = ROWS,
) -> list[Line]:
    """cuBLAS and the best configuration for each shape and number of rows."""
    found = []
    compile_all(bits, row_counts)
    for shape in LLAMA_8B:
        bench = GemmBench(shape, bits)
        for rows in row_counts:
            if bits == "bf16":
                found.append(bench.run_torch(rows, ceilings))
                log(found[-1])
                print(found[-1].show(), flush=True)
            lines = [
                bench.run(rows, tiles, ceilings)
                for tiles in tilings(rows)
                if fits(tiles, shape.gate)
            ]
            for line in lines:
                log(line)
            found.append(best_of(lines))
            print(found[-1].show(), flush=True)
        del bench
        torch.cuda.empty_cache()
    return found


def main() -> None:
    """`python -m tandem_kernels.bench.tune OUT.json [decode gemm rows prefill ...]`."""
    kinds = sys.argv[2:] or ["decode", "gemm", "rows", "prefill", "memory", "quantized"]
    ceilings = begin(11)
    everything: list[Line] = []
    if "rows" in kinds:
        lines = run_norm(16384, 4096, ceilings) + run_activation(8192, 14336, ceilings)
        lines += run_rope(16384, ceilings) + run_rope(16384, ceilings, True)
        everything += lines
        print("\n".join(line.show() for line in lines), flush=True)
    if "memory" in kinds:
        lines = []
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (256, 32, 8, 1):
                lines += run_sampling(rows, 128256, ceilings, dtype, SAMPLING_TILES)
                lines += run_penalties(rows, 128256, ceilings, dtype)
        lines += run_transfer(ceilings)
        everything += lines
        print("\n".join(line.show() for line in lines), flush=True)
    if "decode" in kinds:
        tune_decode(ceilings, everything.append)
    if "prefill" in kinds:
        lines = run_prefill(8192, ceilings, PREFILL_TILES)
        for length, prefix in ((2048, 6144), (8192, 24576), (1024, 0)):
            lines += run_prefill(length, ceilings, PREFILL_TILES[4:5], prefix)
        everything += lines
        print("\n".join(line.show() for line in lines), flush=True)
    if "gemm" in kinds:
        tune_gemm(ceilings, everything.append)
    if "quantized" in kinds:
        tune_gemm(ceilings, everything.append, "int8", (1, 16))
        tune_gemm(ceilings, everything.append, "fp8", (1, 16))
    write_lines(sys.argv[1], ceilings, everything)


if __name__ == "__main__":
    main()
