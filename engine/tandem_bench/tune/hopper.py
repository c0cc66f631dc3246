"""Find where the Gluon product is the fastest, and with what, and add that to the device's file.

It is compared with what `tune-linear` has chosen. Both are timed as the engine launches them, each
allowed to begin before the one before it has ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from tandem_bench.gpu.device import Ceilings, find_ceilings
from tandem_bench.gpu.timing import seconds_per_call
from tandem_bench.kernels.gemm import GemmBench
from tandem_bench.options import argument, option, parse_numbers
from tandem_bench.terminal import results
from tandem_bench.tune.search import TunedFile, in_processes, parse_shape
from tandem_kernels.linear.hopper_linear import HopperTiles, hopper_linear
from tandem_kernels.linear.kernel import choose_tiles, small_linear

_GAIN: Final = 0.98
"""It is chosen where it takes at most this share of the other's time."""

TILES: Final = [
    (64, 64, 4, 12, 128), (64, 128, 4, 4, 128), (64, 128, 4, 6, 128), (64, 128, 4, 6, 96),
    (64, 128, 4, 7, 128), (64, 128, 4, 7, 132), (64, 128, 4, 8, 96), (64, 128, 4, 8, 128),
    (64, 256, 4, 3, 128), (64, 256, 4, 4, 128), (128, 64, 8, 8, 128), (128, 128, 8, 4, 128),
    (64, 128, 4, 8, 132), (64, 128, 4, 10, 128), (64, 128, 4, 10, 132), (64, 256, 4, 5, 128),
]  # fmt: skip
"""(block_n, block_k, warps, stages, programs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Find where the Gluon product is the fastest and add that to this device's file."""

    shapes: tuple[str, ...] = argument(
        "The weight's rows times columns: 6144x4096 4096x4096", metavar="SHAPE..."
    )
    rows: str = option("8,16,32,64", "Numbers of tokens to tune for.")


def hopper_tilings(rows: int) -> list[HopperTiles]:
    """What is worth trying for a number of rows."""
    block_m = max(8, 1 << (rows - 1).bit_length())
    found = [HopperTiles(block_m, *tiles) for tiles in TILES]
    return [tiles for tiles in found if tiles.fits()]


def _compile(job: tuple[int, HopperTiles]) -> None:
    rows, tiles = job
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16)
    hopper_linear(x, weight, tiles=tiles, overlap=True)


def compile_hopper(row_counts: Sequence[int], num_processes: int = 14) -> None:
    """Compile all configurations in parallel."""
    jobs = [(rows, tiles) for rows in row_counts for tiles in hopper_tilings(rows)]
    in_processes(_compile, jobs, num_processes)


def seconds_without(bench: GemmBench, rows: int) -> float:
    """What is chosen without the Gluon product, each launch before the last has ended."""
    shape = bench.shape
    x = torch.randn(rows, shape.size, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(rows, shape.columns, device="cuda", dtype=torch.bfloat16)
    tiles = choose_tiles(rows, shape.columns, shape.size, False)

    def call(weight: torch.Tensor) -> torch.Tensor:
        if tiles is None:
            return torch.mm(x, weight.t(), out=out)
        return small_linear(x, weight, out=out, tiles=tiles, overlap=True)

    return seconds_per_call([partial(call, weight) for weight in bench.weights])


def best_tiles(bench: GemmBench, rows: int, ceilings: Ceilings) -> list[int]:
    """The fastest configuration, in the file's form; empty where it gains nothing."""
    without = seconds_without(bench, rows)
    found = {
        tiles: bench.run_hopper(rows, tiles, ceilings).seconds for tiles in hopper_tilings(rows)
    }
    best = min(found, key=lambda tiles: found[tiles])
    results.print(
        f"{bench.shape.name} M={rows}: {without * 1e6:.1f} µs without,"
        f" {found[best] * 1e6:.1f} µs with {best}",
        soft_wrap=True,
        markup=False,
    )
    if found[best] > _GAIN * without:
        return []
    return [best.block_m, best.block_n, best.block_k, best.warps, best.stages, best.programs]


def run(options: Options) -> None:
    """Tune, and write what was found into the package."""
    shapes = [parse_shape(text) for text in options.shapes]
    rows = parse_numbers(options.rows, "--rows")
    ceilings = find_ceilings()
    compile_hopper(rows)
    file = TunedFile(ceilings.device)
    for shape in shapes:
        bench = GemmBench(shape)
        found = {str(count): best_tiles(bench, count, ceilings) for count in rows}
        del bench
        torch.cuda.empty_cache()
        file.put("hopper gemm", f"{shape.columns}x{shape.size}", found)
