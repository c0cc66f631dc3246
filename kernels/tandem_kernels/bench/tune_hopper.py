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

from tandem_kernels.bench.gemm import GemmBench, GemmShape
from tandem_kernels.bench.timing import check, seconds_per_call
from tandem_kernels.bench.tune_linear import parse_shape, show_table
from tandem_kernels.linear import reference
from tandem_kernels.linear.hopper_linear import HopperTiles, hopper_linear
from tandem_kernels.linear.kernel import choose_tiles, small_linear
from tandem_kernels.tuning import device_file

_GAIN: Final = 0.98
"""It is chosen where it takes at most this share of the other's time."""

TILES: Final = [
    (64, 64, 4, 12, 128), (64, 128, 4, 4, 128), (64, 128, 4, 6, 128), (64, 128, 4, 6, 96),
    (64, 128, 4, 7, 128), (64, 128, 4, 7, 132), (64, 128, 4, 8, 96), (64, 128, 4, 8, 128),
    (64, 256, 4, 3, 128), (64, 256, 4, 4, 128), (128, 64, 8, 8, 128), (128, 128, 8, 4, 128),
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


class Rivals:
    """One shape's weights and one number of rows: what is chosen without it, and the product."""

    def __init__(self, bench: GemmBench, rows: int) -> None:
        self.shape: GemmShape = bench.shape
        self.weights = bench.weights
        device = torch.device("cuda")
        self.x = torch.randn(rows, self.shape.size, device=device, dtype=torch.bfloat16)
        self.out = torch.empty(rows, self.shape.columns, device=device, dtype=torch.bfloat16)
        self.tiles = choose_tiles(rows, self.shape.columns, self.shape.size, False)

    def _rival(self, weight: torch.Tensor) -> None:
        if self.tiles is None:
            torch.mm(self.x, weight.t(), out=self.out)
        else:
            small_linear(self.x, weight, out=self.out, tiles=self.tiles, overlap=True)

    def _hopper(self, tiles: HopperTiles, weight: torch.Tensor) -> None:
        hopper_linear(self.x, weight, out=self.out, tiles=tiles, overlap=True)

    def rival(self) -> float:
        """Seconds."""
        return seconds_per_call([partial(self._rival, weight) for weight in self.weights])

    def hopper(self, tiles: HopperTiles) -> float:
        """Seconds, once its result has been checked."""
        self.out.fill_(float("nan"))
        self._hopper(tiles, self.weights[0])
        expected = reference.linear(self.x.float(), self.weights[0].float())
        check(f"{self.shape.name} {tiles}", self.out, expected, 2e-2)
        return seconds_per_call([partial(self._hopper, tiles, weight) for weight in self.weights])


def best_tiles(bench: GemmBench, rows: int) -> list[int]:
    """The fastest configuration, in the file's form; empty where it gains nothing."""
    rivals = Rivals(bench, rows)
    rival = rivals.rival()
    found = {tiles: rivals.hopper(tiles) for tiles in hopper_tilings(rows)}
    best = min(found, key=lambda tiles: found[tiles])
    print(
        f"{bench.shape.name} M={rows}: {rival * 1e6:.1f} us without,"
        f" {found[best] * 1e6:.1f} us with {best}",
        flush=True,
    )
    if found[best] > _GAIN * rival:
        return []
    return [best.block_m, best.block_n, best.block_k, best.warps, best.stages, best.programs]


def main() -> None:
    """Tune, and write what was found into the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="+", type=parse_shape)
    parser.add_argument("--rows", default="8,16,32,64")
    arguments = parser.parse_args()
    rows = [int(number) for number in arguments.rows.split(",")]
    compile_all(rows)
    path = Path(__file__).parents[1] / "tuned" / device_file(torch.cuda.get_device_name())
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for shape in arguments.shapes:
        bench = GemmBench(shape)
        found = {str(count): best_tiles(bench, count) for count in rows}
        table.setdefault("hopper gemm", {})[f"{shape.columns}x{shape.size}"] = found
        del bench
        torch.cuda.empty_cache()
        path.write_text(show_table(table) + "\n")


if __name__ == "__main__":
    main()
