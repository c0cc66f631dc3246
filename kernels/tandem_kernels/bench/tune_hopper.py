"""Find where the Gluon product is the fastest, and with what, and add that to the device's file.

`python -m tandem_kernels.bench.tune_hopper 6144x4096 4096x4096 ... [--rows 8,16,32,64]`: rows of
the weight times columns. It is compared with what `tune_linear` has chosen. Both are timed as the
engine launches them, each allowed to begin before the one before it has ended.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import torch

from tandem_kernels.bench.gemm import GemmBench
from tandem_kernels.bench.timing import Ceilings, measure_ceilings, seconds_per_call
from tandem_kernels.bench.tune_linear import parse_shape, show_table
from tandem_kernels.linear.hopper_linear import HopperTiles, hopper_linear
from tandem_kernels.linear.kernel import choose_tiles, small_linear
from tandem_kernels.tuning import device_file

_GAIN: Final = 0.98
"""It is chosen where it takes at most this share of the other's time."""

TILES: Final = [
    (64, 64, 4, 12, 128), (64, 128, 4, 4, 128), (64, 128, 4, 6, 128), (64, 128, 4, 6, 96),
    (64, 128, 4, 7, 128), (64, 128, 4, 7, 132), (64, 128, 4, 8, 96), (64, 128, 4, 8, 128),
    (64, 256, 4, 3, 128), (64, 256, 4, 4, 128), (128, 64, 8, 8, 128), (128, 128, 8, 4, 128),
    (64, 128, 4, 8, 132), (64, 128, 4, 10, 128), (64, 128, 4, 10, 132), (64, 256, 4, 5, 128),
]  # fmt: skip
"""(block_n, block_k, warps, stages, programs)."""


def hopper_tilings(rows: int) -> list[HopperTiles]:
    """What is worth trying for a number of rows."""
    block_m = max(8, 1 << (rows - 1).bit_length())
    found = [HopperTiles(block_m, *tiles) for tiles in TILES]
    return [tiles for tiles in found if tiles.fits()]


def _compile(job: tuple[int, HopperTiles]) -> None:
    """In a process of its own: fill Triton's cache on disk."""
    rows, tiles = job
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16)
    hopper_linear(x, weight, tiles=tiles, overlap=True)


def compile_all(row_counts: Sequence[int], processes: int = 14) -> None:
    """Compile all configurations in parallel."""
    jobs = [(rows, tiles) for rows in row_counts for tiles in hopper_tilings(rows)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(_compile, jobs))


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
    print(
        f"{bench.shape.name} M={rows}: {without * 1e6:.1f} us without,"
        f" {found[best] * 1e6:.1f} us with {best}",
        flush=True,
    )
    if found[best] > _GAIN * without:
        return []
    return [best.block_m, best.block_n, best.block_k, best.warps, best.stages, best.programs]


def main() -> None:
    """Tune, and write what was found into the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="+", type=parse_shape)
    parser.add_argument("--rows", default="8,16,32,64")
    arguments = parser.parse_args()
    rows = [int(number) for number in arguments.rows.split(",")]
    ceilings = measure_ceilings()
    compile_all(rows)
    path = Path(__file__).parents[1] / "tuned" / device_file(ceilings.device)
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for shape in arguments.shapes:
        bench = GemmBench(shape)
        found = {str(count): best_tiles(bench, count, ceilings) for count in rows}
        table.setdefault("hopper gemm", {})[f"{shape.columns}x{shape.size}"] = found
        del bench
        torch.cuda.empty_cache()
        path.write_text(show_table(table) + "\n")


if __name__ == "__main__":
    main()
