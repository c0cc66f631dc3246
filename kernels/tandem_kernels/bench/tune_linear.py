"""Find the linear kernels' configurations for further shapes and add them to the device's file.

`python -m tandem_kernels.bench.tune_linear 4608x3584 37888x3584:gate ... [--rows 1,8,16,32,64]`:
rows of the weight times columns; a gated one counts both halves.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Final

import torch
import triton

from tandem_kernels.bench.gemm import GemmBench, GemmShape, fits, tilings
from tandem_kernels.bench.timing import Ceilings, measure_ceilings
from tandem_kernels.bench.tune import compile_all
from tandem_kernels.linear.kernel import GemmTiles
from tandem_kernels.tuning import device_file

_LAUNCH_SECONDS: Final = 1.5e-6
"""What a cuBLAS product loses in a graph: it can't start before the kernel in front has ended."""
_GATE_SECONDS: Final = 2e-6
"""The activation's own kernel, which cuBLAS needs behind it."""


def parse_shape(text: str) -> GemmShape:
    """A shape of the command line."""
    sizes, _, gate = text.partition(":")
    columns, size = map(int, sizes.split("x"))
    return GemmShape(text, columns, size, gate == "gate")


def best_tiles(bench: GemmBench, rows: int, ceilings: Ceilings) -> list[int]:
    """The fastest configuration, in the file's form; empty where cuBLAS is faster."""
    gate = bench.shape.gate
    library = bench.run_torch(rows, ceilings)
    print(library.show(), flush=True)
    best: GemmTiles | None = None
    seconds = library.seconds + _LAUNCH_SECONDS + (_GATE_SECONDS if gate else 0.0)
    for tiles in tilings(rows):
        if fits(tiles, gate):
            line = bench.run(rows, tiles, ceilings)
            if line.seconds < seconds:
                seconds, best = line.seconds, tiles
                print(line.show(), flush=True)
    if best is None:
        return []
    return [best.block_m, best.block_n, best.block_k, best.warps, best.stages]


def show_table(table: dict[str, Any], indent: str = "") -> str:
    """JSON in which every object that holds no other is on one line."""
    if not any(isinstance(value, dict) for value in table.values()):
        return json.dumps(table)
    inner = indent + "  "
    lines = [
        f"{inner}{json.dumps(key)}: "
        + (show_table(value, inner) if isinstance(value, dict) else json.dumps(value))
        for key, value in table.items()
    ]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def main() -> None:
    """Tune, and write what was found into the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="+", type=parse_shape)
    parser.add_argument("--rows", default="1,4,8,16,32,64")
    arguments = parser.parse_args()
    rows = [int(number) for number in arguments.rows.split(",")]
    ceilings = measure_ceilings()
    compile_all("bf16", rows)
    path = Path(__file__).parents[1] / "tuned" / device_file(ceilings.device)
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    table |= {"device": ceilings.device, "triton": triton.__version__, "torch": torch.__version__}
    for shape in arguments.shapes:
        bench = GemmBench(shape)
        columns = shape.columns // (2 if shape.gate else 1)
        found = {str(count): best_tiles(bench, count, ceilings) for count in rows}
        name = f"{columns}x{shape.size}" + (" gate" if shape.gate else "")
        table.setdefault("gemm", {})[name] = found
        del bench
        torch.cuda.empty_cache()
        path.write_text(show_table(table) + "\n")
        print(f'"{name}": {json.dumps(found)}', flush=True)


if __name__ == "__main__":
    main()
