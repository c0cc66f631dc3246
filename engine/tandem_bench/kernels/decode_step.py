"""A whole decode step of a dense model in one CUDA graph, with random weights, against its floor.

The step is what a runner replays: plan, embedding, all layers, head and greedy token. Attention
reads real pages of a full cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional

from tandem_bench.gpu.device import Ceilings
from tandem_bench.gpu.lines import Line
from tandem_bench.gpu.timing import check, seconds_per_call
from tandem_kernels.activation import kernel as activation
from tandem_kernels.activation import reference as activation_reference
from tandem_kernels.attention.decode_kernel import paged_decode
from tandem_kernels.attention.split_plan import make_decode_plan
from tandem_kernels.linear import MOST_ROWS, hopper_tiles
from tandem_kernels.linear.hopper_linear import HopperTiles, hopper_linear
from tandem_kernels.linear.kernel import GemmTiles, choose_tiles, small_linear
from tandem_kernels.norm import kernel as norm
from tandem_kernels.norm import reference as norm_reference
from tandem_kernels.rope import kernel as rope
from tandem_kernels.rope import reference as rope_reference
from tandem_kernels.sampling.kernel import greedy

EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense model; the default is Llama-3.1-8B."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    intermediate: int = 14336
    vocab: int = 128256
    qkv_bias: bool = False
    """As Qwen2 has it."""
    qk_norm: bool = False
    """A norm of every query and key head before the rotation, as Qwen3 has it."""

    @property
    def weight_elements(self) -> int:
        """What a step reads of weights."""
        heads = (2 * self.heads + 2 * self.kv_heads) * self.dim
        return self.layers * self.hidden * (heads + 3 * self.intermediate) + (
            self.vocab * self.hidden
        )

    def floor(self, batch: int, context: int, ceilings: Ceilings) -> float:
        """Seconds: weights read or multiplied, plus KV read."""
        weights = max(
            2 * self.weight_elements / ceilings.copy,
            2 * self.weight_elements * batch / ceilings.matmul,
        )
        kv = 4 * self.layers * self.kv_heads * self.dim * batch * context
        return weights + kv / ceilings.copy


class Weights:
    """Random bf16 weights of one shape."""

    def __init__(self, shape: Shape) -> None:
        def random(*size: int) -> torch.Tensor:
            return torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_(std=0.02)

        heads = (shape.heads + 2 * shape.kv_heads) * shape.dim
        self.embedding = torch.randn(shape.vocab, shape.hidden, device="cuda").bfloat16()
        self.head = random(shape.vocab, shape.hidden)
        self.norms = [1 + random(shape.hidden) for _ in range(2 * shape.layers + 1)]
        self.qkv = [random(heads, shape.hidden) for _ in range(shape.layers)]
        self.qkv_bias = [random(heads) if shape.qkv_bias else None for _ in range(shape.layers)]
        self.query_norms, self.key_norms = (
            [1 + random(shape.dim) if shape.qk_norm else None for _ in range(shape.layers)]
            for _ in range(2)
        )
        self.output = [random(shape.hidden, shape.heads * shape.dim) for _ in range(shape.layers)]
        self.gate_up = [random(2 * shape.intermediate, shape.hidden) for _ in range(shape.layers)]
        self.down = [random(shape.hidden, shape.intermediate) for _ in range(shape.layers)]


@dataclass(frozen=True, slots=True)
class Options:
    """What is compared."""

    overlap: bool = True
    fused: bool | None = None
    triton_gemm: bool = True
    products: Mapping[tuple[int, int], GemmTiles | HopperTiles | None] = field(
        default_factory=dict, hash=False
    )
    """By (columns, size), what to take instead of the table's choice; None: cuBLAS."""


class DecodeStep:
    """Buffers of one (batch, context) and the step over them."""

    def __init__(
        self, shape: Shape, weights: Weights, batch: int, context: int, options: Options
    ) -> None:
        self.shape, self.weights, self.options = shape, weights, options
        page, per_row = 64, -(-context // 64)
        blocks = batch * per_row
        self.caches = [
            torch.empty(
                2, blocks, shape.kv_heads, page, shape.dim, device="cuda", dtype=torch.bfloat16
            ).normal_()
            for _ in range(shape.layers)
        ]
        order = torch.randperm(blocks, device="cuda", dtype=torch.int32)
        self.tables = order.view(batch, per_row)
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.tokens = torch.randint(shape.vocab, (batch,), device="cuda")
        self.positions = torch.full((batch,), context - 1, device="cuda")
        self.blocks = self.tables[:, -1].long().contiguous()
        self.offsets = self.positions % page
        inverse = 500000.0 ** -(torch.arange(0, shape.dim, 2, device="cuda") / shape.dim)
        angles = torch.arange(context, device="cuda")[:, None] * inverse
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.plan = make_decode_plan(
            self.lengths, self.tables, shape.heads, shape.kv_heads, shape.dim
        )
        self.scale = shape.dim**-0.5
        self.sampled = torch.empty_like(self.tokens)

    def _linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        gate: bool = False,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        place, overlap = (weight.shape[0] // (2 if gate else 1), x.shape[1]), self.options.overlap
        products = self.options.products
        tiles = products[place] if place in products else self.table_tiles(x, weight, gate)
        if isinstance(tiles, HopperTiles):
            return hopper_linear(x, weight, bias, tiles=tiles, overlap=overlap)
        if tiles is not None:
            return small_linear(x, weight, bias, gate=gate, tiles=tiles, overlap=overlap)
        found = functional.linear(x, weight, bias)
        return activation.silu_and_multiply(found) if gate else found

    def table_tiles(
        self, x: torch.Tensor, weight: torch.Tensor, gate: bool
    ) -> GemmTiles | HopperTiles | None:
        """What the tuned table chooses; None: cuBLAS."""
        rows, size = x.shape
        columns = weight.shape[0] // (2 if gate else 1)
        if not self.options.triton_gemm or rows > MOST_ROWS:
            return None
        on_hopper = None if gate else hopper_tiles(x, weight)
        return on_hopper or choose_tiles(rows, columns, size, gate)

    def logits(self) -> torch.Tensor:
        """One step; [B, V]."""
        shape, weights, overlap = self.shape, self.weights, self.options.overlap
        self.plan.refill()
        residual = functional.embedding(self.tokens, weights.embedding)
        cos, sin = self.cos[self.positions], self.sin[self.positions]
        x = norm.rms_norm(residual, weights.norms[0], EPSILON)
        for layer in range(shape.layers):
            keys, values = self.caches[layer]
            qkv = self._linear(x, weights.qkv[layer], bias=weights.qkv_bias[layer])
            query = qkv[:, : shape.heads * shape.dim].unflatten(1, (shape.heads, shape.dim))
            rope.rope_and_write(
                qkv, shape.heads, cos, sin, keys, values, self.blocks, self.offsets,
                weights.query_norms[layer], weights.key_norms[layer], EPSILON, out=query,
                overlap=overlap,
            )  # fmt: skip
            found = torch.empty_like(query, memory_format=torch.contiguous_format)
            paged_decode(
                query, keys, values, self.plan, found, self.scale, fused=self.options.fused,
                overlap=overlap,
            )  # fmt: skip
            x = self._linear(found.flatten(1), weights.output[layer])
            weight = weights.norms[2 * layer + 1]
            x = norm.add_rms_norm(x, residual, weight, EPSILON, overlap=overlap)
            x = self._linear(x, weights.gate_up[layer], gate=True)
            x = self._linear(x, weights.down[layer])
            weight = weights.norms[2 * layer + 2]
            x = norm.add_rms_norm(x, residual, weight, EPSILON, overlap=overlap)
        return self._linear(x, weights.head)

    def run(self) -> None:
        """The step and its greedy tokens."""
        greedy(self.logits(), self.sampled)

    def expected(self) -> torch.Tensor:
        """The step's logits in plain torch with exact attention, from the same cache; [B, V]."""
        shape, weights = self.shape, self.weights
        x = functional.embedding(self.tokens, weights.embedding)
        cos, sin = self.cos[self.positions], self.sin[self.positions]
        for layer in range(shape.layers):
            keys, values = self.caches[layer].clone()
            normed = norm_reference.rms_norm(x, weights.norms[2 * layer], EPSILON)
            query = rope_reference.rope_and_write(
                functional.linear(normed, weights.qkv[layer], weights.qkv_bias[layer]), shape.heads,
                cos, sin, keys, values, self.blocks, self.offsets,
                weights.query_norms[layer], weights.key_norms[layer], EPSILON,
            )  # fmt: skip
            k, v = (
                side[self.tables].transpose(2, 3).flatten(1, 2).transpose(1, 2).float()
                for side in (keys, values)
            )
            group = shape.heads // shape.kv_heads
            length = int(self.lengths[0])
            found = functional.scaled_dot_product_attention(
                query.float()[:, :, None],
                k[:, :, :length].repeat_interleave(group, 1),
                v[:, :, :length].repeat_interleave(group, 1),
            )
            x = x + functional.linear(found.flatten(1).bfloat16(), weights.output[layer])
            normed = norm_reference.rms_norm(x, weights.norms[2 * layer + 1], EPSILON)
            gated = activation_reference.silu_and_multiply(
                functional.linear(normed, weights.gate_up[layer])
            )
            x = x + functional.linear(gated, weights.down[layer])
        return functional.linear(
            norm_reference.rms_norm(x, weights.norms[-1], EPSILON), weights.head
        )


def check_step(options: Options, batch: int, context: int, shape: Shape) -> float:
    """Two layers of the shape against torch, eagerly and from a graph that is replayed twice."""
    shape = replace(shape, layers=2)
    step = DecodeStep(shape, Weights(shape), batch, context, options)
    expected = step.expected()
    error = check(f"step {options}", step.logits(), expected, 2e-2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step.logits()
    for _ in range(3):
        found.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        error = max(error, check(f"graph {options}", found, expected, 2e-2))
    return error


CHECKED = ((1, 1000), (5, 700), (32, 130), (80, 64))
"""(batch, context) of the checks."""

VARIANTS = (Options(overlap=False, triton_gemm=False), Options(overlap=False))
"""What the shipped step is compared with: launches one after the other, and cuBLAS alone."""


def step_line(
    shape: Shape,
    weights: Weights,
    case: tuple[int, int],
    options: Options,
    ceilings: Ceilings,
    error: float,
) -> Line:
    """The time of one (batch, context) beside its floor; `error` is that of the check before."""
    step = DecodeStep(shape, weights, *case, options)
    seconds = seconds_per_call([step.run], 9)
    del step
    torch.cuda.empty_cache()
    name = f"decode step {case[0]} x {case[1]}"
    note = f"{case[0] / seconds:.0f} tok/s {options}"
    return Line(name, seconds, shape.floor(*case, ceilings), error, note)
