"""Mixture of experts against the weights of the experts hit, or the matmul rate.

`python -m tandem_kernels.bench.moe OUT.json [tune [TOKENS ...]]`. With `tune` every configuration
of both products is checked and timed first; the JSON's "tuned" is what `tuned/` should hold. With
`compile` in place of the file all of them are compiled in parallel, and nothing is measured.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch
import triton

from tandem_kernels.bench.record import begin, write_lines
from tandem_kernels.bench.timing import (
    Call,
    Ceilings,
    Line,
    WrongResultError,
    check,
    seconds_per_call,
)
from tandem_kernels.moe import Routing, kernel, reference
from tandem_kernels.moe.kernel import ExpertTiles, ProductTiles, run_product
from tandem_kernels.moe.plan_kernel import ExpertPlan, make_plan, plan_given
from tandem_kernels.moe.route_kernel import route
from tandem_kernels.moe.token_kernel import VectorTiles

TOKENS = (1, 8, 32, 64, 256, 1024, 4096)


@dataclass(frozen=True, slots=True)
class MoeShape:
    """One layer's experts."""

    name: str
    hidden: int
    num_experts: int
    intermediate: int
    top_k: int

    @property
    def elements(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.intermediate

    def key(self) -> str:
        """Name in the tuned file."""
        return f"{self.num_experts}x{self.intermediate}x{self.hidden} top {self.top_k}"


SHAPES = (
    MoeShape("Qwen3-30B-A3B", 2048, 128, 768, 8),
    MoeShape("Mixtral-8x7B", 4096, 8, 14336, 2),
)

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


class MoeBench:
    """Weights of one shape; every call has a routing of its own, so experts change."""

    def __init__(self, shape: MoeShape) -> None:
        self.shape = shape
        size = (shape.num_experts, 2 * shape.intermediate, shape.hidden)
        self.gate_up = torch.empty(size, device="cuda", dtype=torch.bfloat16)
        self.gate_up.normal_(std=shape.hidden**-0.5)
        self.down = torch.empty(
            shape.num_experts, shape.hidden, shape.intermediate, device="cuda", dtype=torch.bfloat16
        ).normal_(std=shape.intermediate**-0.5)
        self.routing = Routing(shape.top_k, renormalise=True)

    def inputs(self, tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Tokens and logits of several calls."""
        calls = 8 if tokens <= 64 else 3
        device, shape = "cuda", self.shape
        xs = [
            torch.randn(tokens, shape.hidden, device=device, dtype=torch.bfloat16)
            for _ in range(calls)
        ]
        logits = [torch.randn(tokens, shape.num_experts, device=device) for _ in range(calls)]
        return xs, logits

    def floor(self, logits: Sequence[torch.Tensor], ceilings: Ceilings, part: float = 1.0) -> float:
        """Seconds: weights of the experts hit, or the products; the larger. `part` of both."""
        hit = 0
        for some in logits:
            hit += reference.route(some, self.routing)[1].unique().numel()
        elements = part * self.shape.elements
        read = 2 * elements * hit / len(logits) / ceilings.copy
        pairs = logits[0].shape[0] * self.shape.top_k
        return max(read, 2 * elements * pairs / ceilings.matmul)

    def expected(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """In float32."""
        weights, ids = reference.route(logits, self.routing)
        return reference.apply_experts(x.float(), weights, ids, self.gate_up, self.down)

    def run(
        self,
        tokens: int,
        ceilings: Ceilings,
        tiles: ExpertTiles | VectorTiles | None = None,
        overlap: bool = False,
    ) -> Line:
        """Routing to sum, checked, then timed."""
        xs, logits = self.inputs(tokens)
        out = torch.full_like(xs[0], float("nan"))

        def call(index: int) -> torch.Tensor:
            return kernel.fused_moe(
                xs[index], logits[index], self.gate_up, self.down, self.routing,
                overlap=overlap, out=out, tiles=tiles,
            )  # fmt: skip

        name = f"{self.shape.name} T={tokens}" + (" overlap" if overlap else "")
        error = check(name, call(0), self.expected(xs[0], logits[0]), 2e-2)
        seconds = seconds_per_call([partial(call, index) for index in range(len(xs))])
        return Line(name, seconds, self.floor(logits, ceilings), error, str(tiles or ""))

    def run_products(self, tokens: int, ceilings: Ceilings) -> Iterator[tuple[int, bool, Line]]:
        """Each product alone in every configuration: (block_m, whether gate-up, result)."""
        shape = self.shape
        xs, logits = self.inputs(tokens)
        routes = [reference.route(some, self.routing) for some in logits]
        pairs = tokens * shape.top_k
        inner = torch.randn(pairs, shape.intermediate, device="cuda", dtype=torch.bfloat16)
        wide = torch.empty(pairs, shape.hidden, device="cuda", dtype=torch.bfloat16)
        plans: dict[int, list[ExpertPlan]] = {}
        first: dict[bool, torch.Tensor] = {}
        for block_m, tiles, gate in candidates(shape, tokens):
            if block_m not in plans:
                plans[block_m] = [plan_given(*r, shape.num_experts, block_m) for r in routes]
            weight = self.gate_up if gate else self.down
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
                print(f"{shape.name} T={tokens} {block_m} {tiles}: {problem}", flush=True)
                continue
            floor = self.floor(logits, ceilings, 2 / 3 if gate else 1 / 3)
            name = f"{shape.name} T={tokens} {'gate_up' if gate else 'down'}"
            yield block_m, gate, Line(name, seconds, floor, error, f"{block_m} {astuple(tiles)}")

    def run_vectors(self, ceilings: Ceilings) -> Iterator[tuple[VectorTiles, Line]]:
        """One token: first the gate-up launch varies, then the down launch."""
        times: dict[VectorTiles, float] = {}
        for gate in VECTORS:
            for bits in (0, 7):
                tiles = VectorTiles(*gate, *DOWN_VECTORS[0], overlap=bits)
                yield tiles, (line := self.run(1, ceilings, tiles, True))
                times[tiles] = line.seconds
        for down in DOWN_VECTORS[1:]:
            best = min(times, key=lambda tiles: times[tiles])
            tiles = VectorTiles(*astuple(best)[:4], *down, best.overlap)  # type: ignore[call-arg]
            yield tiles, (line := self.run(1, ceilings, tiles, True))
            times[tiles] = line.seconds
        best = min(times, key=lambda tiles: times[tiles])
        for bits in range(8):
            tiles = replace(best, overlap=bits)
            yield tiles, self.run(1, ceilings, tiles, True)

    def run_parts(self, tokens: int, ceilings: Ceilings) -> list[Line]:
        """What is neither of the two products: routing with sorting, and the sum."""
        _, logits = self.inputs(tokens)
        lines = []
        tiles = kernel.tiles_for(tokens, self.shape.top_k, self.gate_up, self.down)
        calls: list[Call] = [partial(route, some, self.routing) for some in logits]
        if isinstance(tiles, ExpertTiles):
            block_m = tiles.block_m
            calls = [partial(make_plan, some, self.routing, None, block_m) for some in logits]
        name = f"{self.shape.name} T={tokens} routing"
        lines.append(Line(name, seconds_per_call(calls * 4), logits[0].nbytes / ceilings.copy, 0.0))
        if tokens > 1:
            pairs = torch.randn(
                tokens * self.shape.top_k, self.shape.hidden, device="cuda", dtype=torch.bfloat16
            )
            out = torch.full((tokens, self.shape.hidden), float("nan"), device="cuda")
            out = out.bfloat16()
            kernel.sum_pairs(pairs, out, self.shape.top_k)
            expected = pairs.float().unflatten(0, (tokens, -1)).sum(1)
            error = check("sum", out, expected, 1e-2)
            seconds = seconds_per_call(
                [partial(kernel.sum_pairs, pairs, out, self.shape.top_k) for _ in range(5)]
            )
            floor = (pairs.nbytes + out.nbytes) / ceilings.copy
            lines.append(Line(f"{self.shape.name} T={tokens} sum", seconds, floor, error))
        return lines


def tune(
    bench: MoeBench, ceilings: Ceilings, counts: Sequence[int], lines: list[Line]
) -> dict[str, dict[str, list[int]]]:
    """What `tuned/` holds of one shape."""
    found: dict[str, dict[str, list[int]]] = {}
    if 1 in counts:
        vectors = list(bench.run_vectors(ceilings))
        lines += [line for _, line in vectors]
        tiles, line = min(vectors, key=lambda pair: pair[1].seconds)
        print(line.show(), flush=True)
        found["1"] = {"vector": list(astuple(tiles))}
    for tokens in counts:
        if tokens == 1:
            continue
        best: dict[tuple[int, bool], Line] = {}
        for block_m, gate, line in bench.run_products(tokens, ceilings):
            lines.append(line)
            kept = best.get((block_m, gate))
            if kept is None or line.seconds < kept.seconds:
                best[block_m, gate] = line
        block_m = min(
            {block_m for block_m, _ in best},
            key=lambda m: best[m, True].seconds + best[m, False].seconds,
        )
        entry = {"block_m": [block_m]}
        for gate, name in ((True, "gate_up"), (False, "down")):
            line = best[block_m, gate]
            print(line.show(), flush=True)
            entry[name] = json.loads(line.note.split(" ", 1)[1].replace("(", "[").replace(")", "]"))
        found[str(tokens)] = entry
    return found


def _compile(job: tuple[MoeShape, int, ProductTiles, bool]) -> None:
    """In a process of its own: fill Triton's cache on disk."""
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


def compile_all(counts: Sequence[int], processes: int = 12) -> None:
    """Compile the products' configurations in forks of this process, which has no GPU context."""
    jobs = [
        (shape, *candidate)
        for shape in SHAPES
        for candidate in dict.fromkeys(c for tokens in counts for c in candidates(shape, tokens))
    ]
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        list(pool.map(_compile, jobs))


def main() -> None:
    """Tune if asked to, then check and time every case."""
    counts = [int(word) for word in sys.argv[2:] if word.isdigit()] or TOKENS
    if sys.argv[1] == "compile":
        compile_all(counts)
        return
    tuning = "tune" in sys.argv[2:]
    ceilings = begin(13)
    lines: list[Line] = []
    finals: list[Line] = []
    tuned: dict[str, dict[str, dict[str, list[int]]]] = {}
    for shape in SHAPES:
        bench = MoeBench(shape)
        found = tuned[shape.key()] = tune(bench, ceilings, counts, lines) if tuning else {}
        for tokens in TOKENS:
            tiles: ExpertTiles | VectorTiles | None = None
            if entry := found.get(str(tokens)):
                tiles = kernel.tiles_of(entry)
            finals += bench.run_parts(tokens, ceilings)
            for overlap in (False, True) if tokens <= kernel.MOST_OVERLAPPED else (False,):
                finals.append(bench.run(tokens, ceilings, tiles, overlap))
                print(finals[-1].show(), flush=True)
        del bench
        torch.cuda.empty_cache()
    write_lines(sys.argv[1], ceilings, finals + lines, tuned=tuned)
    print("\n".join(line.show()[:110] for line in finals), flush=True)
    print(json.dumps(tuned))


if __name__ == "__main__":
    main()
