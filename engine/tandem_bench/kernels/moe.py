"""Mixture of experts against the weights of the experts hit, or the matmul rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tandem_bench.gpu.device import Ceilings
from tandem_bench.gpu.lines import Line
from tandem_bench.gpu.timing import Call, check, seconds_per_call
from tandem_kernels.moe import Routing, kernel, reference
from tandem_kernels.moe.kernel import ExpertTiles
from tandem_kernels.moe.plan_kernel import make_plan
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
