"""Mixtures of experts: every configuration of both products, checked and timed.

With `--search` the JSON's "tuned" is what the package's `tuned/` should hold; without, the shipped
configurations are timed with and without overlap, and so is what is neither of the products.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton

from tandem_bench.errors import WrongResultError
from tandem_bench.gpu.device import Ceilings, find_ceilings
from tandem_bench.gpu.lines import Line, LineTable
from tandem_bench.gpu.timing import check, seconds_per_call
from tandem_bench.kernels.moe import SHAPES, TOKENS, MoeBench, MoeShape
from tandem_bench.options import json_option, option, parse_numbers
from tandem_bench.terminal import results
from tandem_bench.tune.search import in_processes
from tandem_kernels.moe import kernel, reference
from tandem_kernels.moe.kernel import ExpertTiles, ProductTiles, run_product
from tandem_kernels.moe.plan_kernel import ExpertPlan, plan_given
from tandem_kernels.moe.token_kernel import VectorTiles

Entry = dict[str, list[int]]
"""A configuration in the tuned file's form."""

FEW = [(16, 256, 4, 3), (32, 128, 4, 4), (32, 128, 4, 6), (32, 256, 4, 3), (64, 64, 4, 5),
       (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 8, 3)]  # fmt: skip
SOME = [(32, 128, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 4, 3), (128, 64, 8, 4),
        (256, 64, 8, 3), (64, 64, 4, 4, 1, 1), (64, 128, 4, 3, 1, 1), (128, 64, 4, 4, 1, 1),
        (128, 64, 8, 4, 1, 1), (256, 64, 8, 3, 1, 1)]  # fmt: skip
MANY = [(64, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 8, 3, 8), (128, 64, 8, 4, 8),
        (256, 64, 8, 3), (256, 64, 8, 4), (256, 64, 8, 4, 8), (128, 64, 8, 3, 1, 1),
        (128, 64, 8, 4, 1, 1), (128, 64, 8, 3, 8, 1), (128, 64, 8, 4, 8, 1), (256, 64, 8, 3, 1, 1),
        (256, 64, 8, 4, 1, 1), (256, 64, 8, 4, 8, 1)]  # fmt: skip
"""(block_n, block_k, warps, stages, group, tma)."""

VECTORS = [(4, 512, 4, 1), (8, 512, 4, 1), (4, 1024, 4, 1), (2, 2048, 4, 1), (8, 256, 4, 3)]
DOWN_VECTORS = [(4, 256, 4, 3), (8, 256, 4, 1), (2, 256, 4, 4), (4, 256, 2, 3), (8, 256, 4, 3),
                (2, 256, 2, 4)]  # fmt: skip


def candidates(shape: MoeShape, tokens: int) -> Iterator[tuple[int, ProductTiles, bool]]:
    """(block_m, tiles, gate) worth trying."""
    each = tokens * shape.top_k / shape.num_experts
    block_ms = [16] if each <= 8 else [16, 32] if each <= 20 else [64]
    block_ms = [128] if each > 128 else block_ms
    for block_m in block_ms:
        for tiles in FEW if block_m == 16 else SOME if each <= 128 else MANY:
            found = ProductTiles(*tiles)
            for gate in (False, True):
                columns = found.block_n * (2 if gate else 1)
                memory = found.stages * (block_m + columns) * found.block_k * 2
                if memory < 225_000 and block_m * columns <= 128 * 256:
                    yield block_m, found, gate


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Time mixtures of experts, and with --search try every configuration of the products."""

    search: bool = option(False, "Try every configuration first; time with the best.")
    tokens: str = option("1,8,32,64,256,1024,4096", "Numbers of tokens to search for.")
    compile_only: bool = option(
        False, "Compile every configuration in parallel and measure nothing.", name="--compile-only"
    )
    json_file: Path | None = json_option()


@dataclass(frozen=True, slots=True)
class Tried:
    """One product in one configuration."""

    block_m: int
    gate: bool
    tiles: ProductTiles
    line: Line


def product_lines(bench: MoeBench, tokens: int, ceilings: Ceilings) -> Iterator[Tried]:
    """Each product alone in every configuration."""
    shape = bench.shape
    xs, logits = bench.inputs(tokens)
    routes = [reference.route(some, bench.routing) for some in logits]
    pairs = tokens * shape.top_k
    inner = torch.randn(pairs, shape.intermediate, device="cuda", dtype=torch.bfloat16)
    wide = torch.empty(pairs, shape.hidden, device="cuda", dtype=torch.bfloat16)
    plans: dict[int, list[ExpertPlan]] = {}
    first: dict[bool, torch.Tensor] = {}
    for block_m, tiles, gate in candidates(shape, tokens):
        if block_m not in plans:
            plans[block_m] = [plan_given(*r, shape.num_experts, block_m) for r in routes]
        weight = bench.gate_up if gate else bench.down
        out = torch.full_like(inner if gate else wide, float("nan"))

        def call(
            index: int,
            gate: bool = gate,
            block_m: int = block_m,
            tiles: ProductTiles = tiles,
            weight: torch.Tensor = weight,
            out: torch.Tensor = out,
        ) -> None:
            x = xs[index] if gate else inner
            run_product(x, weight, plans[block_m][index], out, block_m, tiles, gate)

        try:
            call(0)
            # Rows of a sorted pair have the same order in every plan.
            error = check(f"{tiles} {block_m}", out, first.setdefault(gate, out.clone()), 1e-2)
            seconds = seconds_per_call([partial(call, n) for n in range(len(xs))], 7)
        except (triton.runtime.errors.OutOfResources, WrongResultError) as problem:
            told = f"{shape.name} T={tokens} {block_m} {tiles}: {problem}"
            results.print(told, soft_wrap=True, markup=False)
            continue
        floor = bench.floor(logits, ceilings, 2 / 3 if gate else 1 / 3)
        name = f"{shape.name} T={tokens} {'gate_up' if gate else 'down'}"
        line = Line(name, seconds, floor, error, f"{block_m} {astuple(tiles)}")
        yield Tried(block_m, gate, tiles, line)


def vector_lines(bench: MoeBench, ceilings: Ceilings) -> Iterator[tuple[VectorTiles, Line]]:
    """One token: first the gate-up launch varies, then the down launch."""
    times: dict[VectorTiles, float] = {}
    for gate in VECTORS:
        for bits in (0, 7):
            tiles = VectorTiles(*gate, *DOWN_VECTORS[0], overlap=bits)
            yield tiles, (line := bench.run(1, ceilings, tiles, True))
            times[tiles] = line.seconds
    for down in DOWN_VECTORS[1:]:
        best = min(times, key=lambda tiles: times[tiles])
        size, depth, warps, stages = down
        tiles = replace(best, down_n=size, down_k=depth, down_warps=warps, down_stages=stages)
        yield tiles, (line := bench.run(1, ceilings, tiles, True))
        times[tiles] = line.seconds
    best = min(times, key=lambda tiles: times[tiles])
    for bits in range(8):
        tiles = replace(best, overlap=bits)
        yield tiles, bench.run(1, ceilings, tiles, True)


def search_vectors(bench: MoeBench, ceilings: Ceilings, table: LineTable) -> Entry:
    """The best configuration for one token."""
    tried = list(vector_lines(bench, ceilings))
    tiles, best = min(tried, key=lambda pair: pair[1].seconds)
    for _, line in tried:
        table.keep("search", line, shown=line is best)
    return {"vector": list(astuple(tiles))}


def search_products(bench: MoeBench, tokens: int, ceilings: Ceilings, table: LineTable) -> Entry:
    """The best configurations of both products, which share the block of rows."""
    best: dict[tuple[int, bool], Tried] = {}
    for tried in product_lines(bench, tokens, ceilings):
        table.keep("search", tried.line, shown=False)
        kept = best.get((tried.block_m, tried.gate))
        if kept is None or tried.line.seconds < kept.line.seconds:
            best[tried.block_m, tried.gate] = tried
    block_m = min(
        {block_m for block_m, _ in best},
        key=lambda m: best[m, True].line.seconds + best[m, False].line.seconds,
    )
    entry = {"block_m": [block_m]}
    for gate, name in ((True, "gate_up"), (False, "down")):
        results.print(best[block_m, gate].line.show(), soft_wrap=True)
        entry[name] = list(astuple(best[block_m, gate].tiles))
    return entry


def search(
    bench: MoeBench, ceilings: Ceilings, counts: Sequence[int], table: LineTable
) -> dict[str, Entry]:
    """What the tuned file holds of one shape, by number of tokens."""
    found = {"1": search_vectors(bench, ceilings, table)} if 1 in counts else {}
    for tokens in counts:
        if tokens > 1:
            found[str(tokens)] = search_products(bench, tokens, ceilings, table)
    return found


def final_lines(bench: MoeBench, ceilings: Ceilings, found: dict[str, Entry]) -> Iterator[Line]:
    """Routing, sum and the whole, in what was found or else in what is shipped."""
    for tokens in TOKENS:
        tiles: ExpertTiles | VectorTiles | None = None
        if entry := found.get(str(tokens)):
            tiles = kernel.tiles_of(entry)
        yield from bench.run_parts(tokens, ceilings)
        for overlap in (False, True) if tokens <= kernel.MOST_OVERLAPPED else (False,):
            yield bench.run(tokens, ceilings, tiles, overlap)


def _compile(job: tuple[MoeShape, int, ProductTiles, bool]) -> None:
    shape, block_m, tiles, gate = job
    rows, columns = shape.hidden, 2 * shape.intermediate
    size = (shape.top_k, columns, rows) if gate else (shape.top_k, rows, shape.intermediate)
    weight = torch.empty(size, device="cuda", dtype=torch.bfloat16)
    x = torch.empty(shape.top_k, size[2], device="cuda", dtype=torch.bfloat16)
    out = torch.empty(shape.top_k, columns // 2 if gate else rows, device="cuda", dtype=x.dtype)
    plan = ExpertPlan(
        torch.zeros(1, shape.top_k, device="cuda"),
        torch.zeros(shape.top_k, dtype=torch.int32, device="cuda"),
        torch.zeros(3, 1, dtype=torch.int32, device="cuda"),
    )
    try:
        run_product(x, weight, plan, out, block_m, tiles, gate)
    except triton.runtime.errors.OutOfResources:
        return


def compile_products(counts: Sequence[int], num_processes: int = 12) -> None:
    """Compile the products' configurations in forks of this process, which has no GPU context."""
    jobs = [
        (shape, *candidate)
        for shape in SHAPES
        for candidate in dict.fromkeys(c for tokens in counts for c in candidates(shape, tokens))
    ]
    in_processes(_compile, jobs, num_processes, start="fork")


def run(options: Options) -> None:
    """Search if asked to, then check and time every case."""
    counts = parse_numbers(options.tokens, "--tokens")
    if options.compile_only:
        compile_products(counts)
        return
    ceilings = find_ceilings(13)
    table = LineTable(ceilings)
    tuned: dict[str, dict[str, Entry]] = {}
    for shape in SHAPES:
        bench = MoeBench(shape)
        found = search(bench, ceilings, counts, table) if options.search else {}
        tuned[shape.key()] = found
        table.take(shape.name, final_lines(bench, ceilings, found))
        del bench
        torch.cuda.empty_cache()
    results.print(json.dumps(tuned), soft_wrap=True, markup=False)
    table.finish({"tokens": counts, "search": options.search}, options.json_file, tuned=tuned)
