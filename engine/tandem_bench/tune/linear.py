"""Find the linear kernels' configurations for further shapes and add them to the device's file."""

import json
from dataclasses import dataclass
from typing import Final

import torch

from tandem_bench.gpu.device import Ceilings, find_ceilings
from tandem_bench.kernels.gemm import GemmBench
from tandem_bench.options import argument, option, parse_numbers
from tandem_bench.terminal import results
from tandem_bench.tune.gemm import compile_products, fits, tilings
from tandem_bench.tune.search import TunedFile, parse_shape
from tandem_kernels.linear.kernel import GemmTiles

_LAUNCH_SECONDS: Final = 1.5e-6
"""What a cuBLAS product loses in a graph: it can't start before the kernel in front has ended."""
_GATE_SECONDS: Final = 2e-6
"""The activation's own kernel, which cuBLAS needs behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Find the linear kernels' configurations for shapes and add them to this device's file."""

    shapes: tuple[str, ...] = argument(
        "The weight's rows times columns; `:gate` for a gated one, whose rows count both halves: "
        "4608x3584 37888x3584:gate",
        metavar="SHAPE...",
    )
    rows: str = option("1,4,8,16,32,64", "Numbers of tokens to tune for.")


def best_tiles(bench: GemmBench, rows: int, ceilings: Ceilings) -> list[int]:
    """The fastest configuration, in the file's form; empty where cuBLAS is faster."""
    gate = bench.shape.gate
    library = bench.run_torch(rows, ceilings)
    results.print(library.show(), soft_wrap=True)
    best: GemmTiles | None = None
    seconds = library.seconds + _LAUNCH_SECONDS + (_GATE_SECONDS if gate else 0.0)
    for tiles in tilings(rows):
        if fits(tiles, gate):
            line = bench.run(rows, tiles, ceilings)
            if line.seconds < seconds:
                seconds, best = line.seconds, tiles
                results.print(line.show(), soft_wrap=True)
    if best is None:
        return []
    return [best.block_m, best.block_n, best.block_k, best.warps, best.stages]


def run(options: Options) -> None:
    """Tune, and write what was found into the package."""
    shapes = [parse_shape(text) for text in options.shapes]
    rows = parse_numbers(options.rows, "--rows")
    ceilings = find_ceilings()
    compile_products("bf16", rows)
    file = TunedFile(ceilings.device)
    file.name_versions()
    for shape in shapes:
        bench = GemmBench(shape)
        found = {str(count): best_tiles(bench, count, ceilings) for count in rows}
        del bench
        torch.cuda.empty_cache()
        file.put("gemm", shape.entry, found)
        results.print(f'"{shape.entry}": {json.dumps(found)}', soft_wrap=True, markup=False)
