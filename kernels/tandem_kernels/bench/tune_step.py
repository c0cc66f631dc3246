"""Choose products and split plans by the time of a whole decode step, into the device's file.

`python -m tandem_kernels.bench.tune_step [--model llama-8b] [--rows 1,8,16,32,64,128]`.

A product alone, launched over and over, is not what a step has: there it starts beside the end of a
norm or of attention, and what it asks for ahead competes with what still runs. So each product's
fastest configurations alone are tried in the step, one product after the other.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import torch
import triton

from tandem_kernels.attention.split_plan import make_decode_plan
from tandem_kernels.bench import tune_hopper
from tandem_kernels.bench.gemm import GemmBench, GemmShape, fits, tilings
from tandem_kernels.bench.step import DecodeStep, Options, Shape, Weights, check_step
from tandem_kernels.bench.timing import Ceilings, measure_ceilings, seconds_per_call
from tandem_kernels.bench.tune import compile_all
from tandem_kernels.bench.tune_linear import show_table
from tandem_kernels.linear.hopper_linear import HopperTiles
from tandem_kernels.linear.kernel import GemmTiles
from tandem_kernels.tuning import device_file

Tiles = GemmTiles | HopperTiles | None
SHAPES: Final = {
    "llama-8b": Shape(),
    "qwen2.5-7b": Shape(28, 3584, 28, 4, 128, 18944, 152064, qkv_bias=True),
}
CONTEXT: Final = 1024
SPLITS: Final = [
    (programs, stages, fused)
    for stages in (3, 4, 5, 6)
    for programs in (132, 264, 528, 1056)
    for fused in (True, False)
]
"""(programs, stages, whether fused) of decode attention."""
_GAIN: Final = 0.998
"""A change is kept where the step takes at most this share of its time without."""
_TRIED: Final = 3
"""Of each kernel, how many of the fastest alone are tried in the step."""


def products(shape: Shape) -> list[GemmShape]:
    """A layer's products and the head, the largest first."""
    heads = (shape.heads + 2 * shape.kv_heads) * shape.dim
    return [
        GemmShape("gate_up", 2 * shape.intermediate, shape.hidden, True),
        GemmShape("down", shape.hidden, shape.intermediate),
        GemmShape("qkv", heads, shape.hidden),
        GemmShape("o", shape.hidden, shape.heads * shape.dim),
        GemmShape("head", shape.vocab, shape.hidden),
    ]


def place(product: GemmShape) -> tuple[int, int]:
    """Its key in `Options.products`."""
    return product.columns // (2 if product.gate else 1), product.size


def fastest_alone(product: GemmShape, rows: Sequence[int], ceilings: Ceilings) -> list[list[Tiles]]:
    """For each number of rows what to try in the step."""
    bench = GemmBench(product)
    found: list[list[Tiles]] = []
    for count in rows:
        plain = sorted(
            (tiles for tiles in tilings(count) if fits(tiles, product.gate)),
            key=lambda tiles: bench.run(count, tiles, ceilings).seconds,
        )
        hopper: list[HopperTiles] = []
        if not product.gate and 1 < count <= 64:
            hopper = sorted(
                tune_hopper.hopper_tilings(count),
                key=lambda tiles: bench.run_hopper(count, tiles, ceilings).seconds,
            )
        library: list[Tiles] = [None] if count > 1 else []
        found.append([*plain[:_TRIED], *hopper[:_TRIED], *library])
    return found


@dataclass(slots=True)
class Chosen:
    """For one number of rows."""

    products: dict[tuple[int, int], Tiles]
    plain: dict[tuple[int, int], GemmTiles | None]
    """The fastest of those tried that need no Gluon."""
    split: tuple[int, int, bool]
    seconds: float


class StepTuner:
    """One decode step, changed piece by piece."""

    def __init__(self, shape: Shape, weights: Weights, rows: int) -> None:
        self.step = DecodeStep(shape, weights, rows, CONTEXT, Options())
        self.rows = rows
        table = {place(product): self._table_choice(product) for product in products(shape)}
        self.step.options = Options(products=table)
        self.chosen = Chosen(table, {}, (132, 3, rows * shape.kv_heads >= 128), 0.0)
        self._set_split(self.chosen.split)
        self.chosen.seconds = self._seconds()

    def _table_choice(self, product: GemmShape) -> Tiles:
        x, weight = (
            torch.empty(count, product.size, dtype=torch.bfloat16, device="cuda")
            for count in (self.rows, product.columns)
        )
        return self.step.table_tiles(x, weight, product.gate)

    def _seconds(self) -> float:
        return seconds_per_call([self.step.run], 9)

    def _set_split(self, split: tuple[int, int, bool]) -> None:
        step, shape = self.step, self.step.shape
        programs, stages, fused = split
        plan = make_decode_plan(
            step.lengths, step.tables, shape.heads, shape.kv_heads, shape.dim, programs=programs
        )
        step.plan = replace(plan, stages=stages, fused=fused)

    def try_products(self, product: GemmShape, candidates: Iterable[Tiles]) -> None:
        """Keep the fastest of the table's choice and the candidates."""
        best, best_plain = self.chosen.seconds, float("inf")
        print(f"  {self.rows} rows, {product.name}: {best * 1e3:.3f} ms", end="")
        for tiles in candidates:
            changed = self.chosen.products | {place(product): tiles}
            self.step.options = Options(products=changed)
            seconds = self._seconds()
            print(f"; {seconds * 1e3:.3f} {astuple(tiles) if tiles else 'cuBLAS'}", end="")
            if not isinstance(tiles, HopperTiles) and seconds < best_plain:
                best_plain, self.chosen.plain[place(product)] = seconds, tiles
            if seconds < _GAIN * self.chosen.seconds and seconds < best:
                best, self.chosen.products = seconds, changed
        print(flush=True)
        self.chosen.seconds = best
        self.step.options = Options(products=self.chosen.products)

    def try_prefetch(self, product: GemmShape) -> None:
        """Of a product of one row, how far ahead the L2 is asked for weights."""
        tiles = self.chosen.products[place(product)]
        if isinstance(tiles, GemmTiles):
            self.try_products(product, [replace(tiles, prefetch=lines) for lines in (2, 4, 16)])

    def try_splits(self) -> None:
        """Keep the fastest split plan."""
        times: dict[tuple[int, int, bool], float] = {}
        for split in SPLITS:
            if split[2] and self.rows == 1:
                continue  # one program merges many splits slower than a launch of its own does
            self._set_split(split)
            try:
                times[split] = self._seconds()
            except triton.runtime.errors.OutOfResources:
                continue
        best = min(times, key=lambda split: times[split])
        if times[best] < self.chosen.seconds:
            self.chosen.split, self.chosen.seconds = best, times[best]
        self._set_split(self.chosen.split)
        lines = [f"{split} {seconds * 1e3:.3f}" for split, seconds in times.items()]
        print(f"  {self.rows} rows, splits: {'; '.join(lines)}", flush=True)


def merge(shapes: dict[str, Any], name: str, found: dict[str, list[int]]) -> None:
    """Put entries of some numbers of rows beside those of others."""
    merged = shapes.get(name, {}) | found
    shapes[name] = {rows: merged[rows] for rows in sorted(merged, key=int)}


def add_to_table(table: dict[str, Any], shape: Shape, chosen: dict[int, Chosen]) -> None:
    """Write what was chosen; what the table's other entries chose stays."""
    split_name = f"{shape.heads}/{shape.kv_heads}x{shape.dim}"
    splits = {str(rows): [*map(int, each.split)] for rows, each in chosen.items()}
    merge(table.setdefault("decode attention", {}), split_name, splits)
    for product in products(shape):
        columns, size = place(product)
        name = f"{columns}x{size}" + (" gate" if product.gate else "")
        plain: dict[str, list[int]] = {}
        hopper: dict[str, list[int]] = {}
        for rows, each in chosen.items():
            tiles, without = each.products[columns, size], each.plain.get((columns, size))
            hopper[str(rows)] = list(astuple(tiles)) if isinstance(tiles, HopperTiles) else []
            otherwise = without if isinstance(tiles, HopperTiles) else tiles
            plain[str(rows)] = [] if otherwise is None else list(astuple(otherwise))
        merge(table.setdefault("gemm", {}), name, plain)
        if not product.gate:
            merge(table.setdefault("hopper gemm", {}), name, hopper)


def compile_hopper(rows: Sequence[int], processes: int = 14) -> None:
    """As `tune_hopper.compile_all`, for those numbers of rows that it takes."""
    few = [count for count in rows if 1 < count <= 64]
    if few:
        tune_hopper.compile_all(few, processes)


def main() -> None:
    """Tune, and write what was found into the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(SHAPES), default="llama-8b")
    parser.add_argument("--rows", default="1,8,16,32,64,128")
    arguments = parser.parse_args()
    rows = [int(number) for number in arguments.rows.split(",")]
    shape, begin = SHAPES[arguments.model], time.monotonic()
    ceilings = measure_ceilings()
    compile_all("bf16", rows)
    compile_hopper(rows)
    print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    # In a process of its own, which leaves this one's memory as a worker has it.
    candidates: dict[GemmShape, list[list[Tiles]]] = {}
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for product in products(shape):
            candidates[product] = pool.submit(fastest_alone, product, rows, ceilings).result()
    print(f"timed alone after {time.monotonic() - begin:.0f} s", flush=True)
    weights = Weights(shape)
    path = Path(__file__).parents[1] / "tuned" / device_file(ceilings.device)
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    table |= {"device": ceilings.device, "triton": triton.__version__, "torch": torch.__version__}
    chosen: dict[int, Chosen] = {}
    for number, count in enumerate(rows):
        tuner = StepTuner(shape, weights, count)
        before = tuner.chosen.seconds
        for product in products(shape):
            tuner.try_products(product, candidates[product][number])
            if count == 1:
                tuner.try_prefetch(product)
        products_only = tuner.chosen.seconds
        tuner.try_splits()
        chosen[count] = tuner.chosen
        floor = shape.floor(count, CONTEXT, ceilings)
        print(
            f"{count} rows: {before * 1e3:.3f} ms before, {products_only * 1e3:.3f} with"
            f" {tuner.chosen.products}, {tuner.chosen.seconds * 1e3:.3f} with"
            f" {tuner.chosen.split}; floor {floor * 1e3:.3f}; {time.monotonic() - begin:.0f} s",
            flush=True,
        )
        add_to_table(table, shape, chosen)
        path.write_text(show_table(table) + "\n")
        del tuner
        torch.cuda.empty_cache()
    for count, each in chosen.items():
        error = check_step(Options(products=each.products), count, 300, shape)
        print(f"{count} rows: error {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
