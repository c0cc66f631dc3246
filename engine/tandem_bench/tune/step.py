"""Choose products and split plans by the time of a whole decode step, into the device's file.

A product that is launched alone, over and over, isn't in the place that it has in a step: there it
starts beside the end of a norm or of attention, and the weights it asks for ahead compete with what
still runs. So the fastest configurations of each product alone are tried in the step, one product
after the other.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Final

import torch
import triton

from tandem_bench.engine.step import read_config, shape_fields
from tandem_bench.errors import WorkloadError
from tandem_bench.gpu.device import Ceilings, find_ceilings
from tandem_bench.gpu.timing import seconds_per_call
from tandem_bench.kernels import decode_step
from tandem_bench.kernels.decode_step import DecodeStep, Shape, Weights, check_step
from tandem_bench.kernels.gemm import GemmBench, GemmShape
from tandem_bench.options import option, parse_numbers
from tandem_bench.terminal import results
from tandem_bench.tune.gemm import compile_products, fits, tilings
from tandem_bench.tune.hopper import compile_hopper, hopper_tilings
from tandem_bench.tune.search import TunedFile, in_processes
from tandem_kernels.attention.split_plan import make_decode_plan
from tandem_kernels.linear.hopper_linear import HopperTiles
from tandem_kernels.linear.kernel import GemmTiles

Tiles = GemmTiles | HopperTiles | None
"""How a product is computed; None: by cuBLAS."""
Split = tuple[int, int, bool]
"""(programs, stages, whether fused) of decode attention."""
Candidates = dict[GemmShape, list[list[Tiles]]]
"""What to try in the step: for each product a list per number of rows."""

CONTEXT: Final = 1024
SPLITS: Final[list[Split]] = [
    (programs, stages, fused)
    for stages in (3, 4, 5, 6)
    for programs in (132, 264, 528, 1056)
    for fused in (True, False)
]
_GAIN: Final = 0.998
"""A change is kept where the step takes at most this share of its time without."""
_TRIED: Final = 3
"""Of each kernel, how many of the fastest alone are tried in the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Choose products and attention's splits by the time of a whole decode step of a dense model.

    What is found is added to this device's file.
    """

    model: str = option("llama-8b", "llama-8b, qwen2.5-7b, qwen3-0.6b, or a dense model's URI.")
    rows: str = option("1,8,16,32,64,128", "Numbers of sequences to tune for.")


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
    """Its key in `decode_step.Options.products`."""
    return product.outputs, product.size


def few_rows(rows: Iterable[int]) -> list[int]:
    """Those numbers of rows that the Gluon product takes."""
    return [count for count in rows if 1 < count <= 64]


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
        if not product.gate and few_rows([count]):
            hopper = sorted(
                hopper_tilings(count),
                key=lambda tiles: bench.run_hopper(count, tiles, ceilings).seconds,
            )
        library: list[Tiles] = [None] if count > 1 else []
        found.append([*plain[:_TRIED], *hopper[:_TRIED], *library])
    return found


def find_candidates(shape: Shape, rows: Sequence[int], ceilings: Ceilings) -> Candidates:
    """Time every product alone, in a process that leaves this one's memory as a worker has it."""
    work = partial(fastest_alone, rows=rows, ceilings=ceilings)
    return dict(zip(products(shape), in_processes(work, products(shape), 1), strict=True))


@dataclass(slots=True)
class Chosen:
    """The choice for one number of rows."""

    products: dict[tuple[int, int], Tiles]
    plain: dict[tuple[int, int], GemmTiles | None]
    """The fastest of those tried that need no Gluon."""
    split: Split
    seconds: float


class StepTuner:
    """One decode step, changed piece by piece."""

    def __init__(self, shape: Shape, weights: Weights, rows: int) -> None:
        self.step = DecodeStep(shape, weights, rows, CONTEXT, decode_step.Options())
        self.rows = rows
        table = {place(product): self._table_choice(product) for product in products(shape)}
        self.step.options = decode_step.Options(products=table)
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

    def _set_split(self, split: Split) -> None:
        step, shape = self.step, self.step.shape
        programs, stages, fused = split
        plan = make_decode_plan(
            step.lengths, step.tables, shape.heads, shape.kv_heads, shape.dim, programs=programs
        )
        step.plan = replace(plan, stages=stages, fused=fused)

    def _show(self, what: str, parts: Iterable[str]) -> None:
        line = f"  {self.rows} rows, {what}: {'; '.join(parts)}"
        results.print(line, soft_wrap=True, markup=False)

    def try_products(self, product: GemmShape, candidates: Iterable[Tiles]) -> None:
        """Keep the fastest of the table's choice and the candidates."""
        best, best_plain = self.chosen.seconds, float("inf")
        shown = [f"{best * 1e3:.3f} ms"]
        for tiles in candidates:
            changed = self.chosen.products | {place(product): tiles}
            self.step.options = decode_step.Options(products=changed)
            seconds = self._seconds()
            shown.append(f"{seconds * 1e3:.3f} {astuple(tiles) if tiles else 'cuBLAS'}")
            if not isinstance(tiles, HopperTiles) and seconds < best_plain:
                best_plain, self.chosen.plain[place(product)] = seconds, tiles
            if seconds < _GAIN * self.chosen.seconds and seconds < best:
                best, self.chosen.products = seconds, changed
        self._show(product.name, shown)
        self.chosen.seconds = best
        self.step.options = decode_step.Options(products=self.chosen.products)

    def try_prefetch(self, product: GemmShape) -> None:
        """For a product of one row, try how far ahead the L2 is asked for weights."""
        tiles = self.chosen.products[place(product)]
        if isinstance(tiles, GemmTiles):
            self.try_products(product, [replace(tiles, prefetch=lines) for lines in (2, 4, 16)])

    def try_splits(self) -> None:
        """Keep the fastest split plan."""
        times: dict[Split, float] = {}
        for split in SPLITS:
            if split[2] and self.rows == 1:
                continue  # one program merges many splits more slowly than a separate launch
            self._set_split(split)
            try:
                times[split] = self._seconds()
            except triton.runtime.errors.OutOfResources:
                continue
        best = min(times, key=lambda split: times[split])
        if times[best] < self.chosen.seconds:
            self.chosen.split, self.chosen.seconds = best, times[best]
        self._set_split(self.chosen.split)
        self._show("splits", [f"{split} {seconds * 1e3:.3f}" for split, seconds in times.items()])


def add_to_file(file: TunedFile, shape: Shape, chosen: dict[int, Chosen]) -> None:
    """Write the choices; the file's entries for other numbers of rows stay."""
    splits = {str(rows): [*map(int, each.split)] for rows, each in chosen.items()}
    file.merge("decode attention", f"{shape.heads}/{shape.kv_heads}x{shape.dim}", splits)
    for product in products(shape):
        plain: dict[str, list[int]] = {}
        hopper: dict[str, list[int]] = {}
        for rows, each in chosen.items():
            tiles, without = each.products[place(product)], each.plain.get(place(product))
            hopper[str(rows)] = list(astuple(tiles)) if isinstance(tiles, HopperTiles) else []
            otherwise = without if isinstance(tiles, HopperTiles) else tiles
            plain[str(rows)] = [] if otherwise is None else list(astuple(otherwise))
        file.merge("gemm", product.entry, plain)
        if not product.gate:
            file.merge("hopper gemm", product.entry, hopper)


def tune_rows(
    shape: Shape,
    weights: Weights,
    rows: int,
    candidates: dict[GemmShape, list[Tiles]],
    floor: float,
) -> Chosen:
    """Products in turn, then splits, for one number of rows; `floor` is the step's, in seconds."""
    tuner = StepTuner(shape, weights, rows)
    before = tuner.chosen.seconds
    for product, tried in candidates.items():
        tuner.try_products(product, tried)
        if rows == 1:
            tuner.try_prefetch(product)
    products_only = tuner.chosen.seconds
    tuner.try_splits()
    chosen = tuner.chosen
    results.print(
        f"{rows} rows: {before * 1e3:.3f} ms before, {products_only * 1e3:.3f} with"
        f" {chosen.products}, {chosen.seconds * 1e3:.3f} with {chosen.split};"
        f" floor {floor * 1e3:.3f}",
        soft_wrap=True,
        markup=False,
    )
    return chosen


def dense_shape(model: str) -> Shape:
    """The shape of a short name or of a model URI.

    Raises:
        WorkloadError: it is neither, or not a dense model.
        ModelSourceError: the model isn't there.
    """
    fields = shape_fields(read_config(model))
    if fields is None:
        raise WorkloadError(
            f"--model {model} is not a dense model, and `tune-step` runs the step of one",
            "choose llama-8b, qwen2.5-7b, qwen3-0.6b, or the URI of a Llama, Mistral or Qwen",
        )
    return Shape(**fields)


def run(options: Options) -> None:
    """Tune, write what was found into the package, and check the steps that it makes."""
    rows = parse_numbers(options.rows, "--rows")
    shape, begin = dense_shape(options.model), time.monotonic()
    ceilings = find_ceilings()
    compile_products("bf16", rows)
    if few := few_rows(rows):
        compile_hopper(few)
    results.print(f"compiled after {time.monotonic() - begin:.0f} s")
    candidates = find_candidates(shape, rows, ceilings)
    results.print(f"timed alone after {time.monotonic() - begin:.0f} s")
    weights = Weights(shape)
    file = TunedFile(ceilings.device)
    file.name_versions()
    chosen: dict[int, Chosen] = {}
    for number, count in enumerate(rows):
        tried = {product: by_rows[number] for product, by_rows in candidates.items()}
        floor = shape.floor(count, CONTEXT, ceilings)
        chosen[count] = tune_rows(shape, weights, count, tried, floor)
        add_to_file(file, shape, chosen)
        torch.cuda.empty_cache()
        results.print(f"{count} rows are in the file after {time.monotonic() - begin:.0f} s")
    for count, each in chosen.items():
        error = check_step(decode_step.Options(products=each.products), count, 300, shape)
        results.print(f"{count} rows: error {error:.1e}")
