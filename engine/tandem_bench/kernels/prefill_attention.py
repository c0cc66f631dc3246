"""Prefill attention of Llama's heads beside torch's own, as shares of the matmul rate."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tandem_bench.gpu.device import Ceilings
from tandem_bench.gpu.lines import Line
from tandem_bench.gpu.timing import check, seconds_per_call
from tandem_kernels.attention.extend_kernel import paged_extend
from tandem_kernels.attention.hopper_extend import (
    describe_pages,
    extend_from_pages,
    plan_tiles,
    suits,
)

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 64
SCALE = DIM**-0.5
Tiles = tuple[int, int, int, int]
"""(block_m, tile, warps, stages)."""
TILES: Tiles = (64, 64, 4, 3)
"""The defaults of `paged_extend` for heads of 128."""


class ChunkBench:
    """Buffers of one causal chunk of `length` tokens behind a cached prefix."""

    def __init__(self, length: int, prefix: int) -> None:
        self.length, self.prefix = length, prefix
        self.name = f"prefill {prefix}+{length}"
        total = prefix + length
        self.query = torch.randn(length, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        shape = (2, -(-total // PAGE), KV_HEADS, PAGE, DIM)
        self.cache = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.table = torch.randperm(shape[1], device="cuda", dtype=torch.int32)[None]
        self.key, self.value = (
            side[self.table[0]].transpose(1, 2).reshape(-1, KV_HEADS, DIM)[:total]
            .transpose(0, 1)[None]
            for side in self.cache
        )  # fmt: skip
        self.rows = self.query.transpose(0, 1)[None]
        self.out = torch.empty_like(self.query)
        self.operations = 4 * HEADS * DIM * (length * prefix + length * length / 2)
        self.last = slice(max(0, length - 200), length)
        self.expected = self._expected(total)

    def _expected(self, total: int) -> torch.Tensor:
        """Float32 attention of the last rows."""
        positions = torch.arange(self.prefix, total, device="cuda")[:, None]
        mask = torch.arange(total, device="cuda") <= positions
        return functional.scaled_dot_product_attention(
            self.rows[:, :, self.last].float(),
            self.key.float().repeat_interleave(4, 1),
            self.value.float().repeat_interleave(4, 1),
            attn_mask=mask[self.last],
        )[0].transpose(0, 1)

    def measure(
        self, kind: str, call: Callable[[], torch.Tensor], ceilings: Ceilings, note: str = ""
    ) -> Line:
        """Check, then time."""
        error = check(self.name, call()[self.last], self.expected, 2e-2)
        seconds = seconds_per_call([call] * 2, 7)
        rate = f"{self.operations / seconds / 1e12:.0f} TFLOP/s{note}"
        floor = self.operations / ceilings.matmul
        return Line(f"{self.name} {kind}", seconds, floor, error, rate)

    def by_torch(self) -> torch.Tensor:
        """Torch's own, on contiguous KV."""
        found = functional.scaled_dot_product_attention(
            self.rows, self.key, self.value, is_causal=True, enable_gqa=True
        )
        return found[0].transpose(0, 1)

    def by_gluon(self) -> Callable[[], torch.Tensor] | None:
        """The kernel in Gluon, where it suits the device."""
        keys, values = self.cache
        if not suits(keys, None):
            return None
        pages = describe_pages(keys, values)
        plan = plan_tiles([(self.prefix, self.length)])
        tiles = torch.tensor(plan, dtype=torch.int32, device="cuda")
        return partial(
            extend_from_pages,
            self.query, pages, self.table, tiles, KV_HEADS, SCALE, None, self.out,
        )  # fmt: skip

    def by_triton(self, tiles: Tiles) -> Callable[[], torch.Tensor]:
        """The kernel in Triton, in one configuration."""
        starts = torch.tensor([self.prefix], dtype=torch.int32, device="cuda")
        row_starts = torch.tensor([0, self.length], dtype=torch.int32, device="cuda")
        block_m, tile, warps, stages = tiles
        return partial(
            paged_extend,
            self.query, self.cache[0], self.cache[1], self.table, starts, row_starts, self.length,
            SCALE, out=self.out, block_m=block_m, tile=tile, warps=warps, stages=stages,
        )  # fmt: skip


def run_prefill(
    length: int, ceilings: Ceilings, tilings: Sequence[Tiles], prefix: int = 0
) -> Iterator[Line]:
    """One chunk: torch's backends on contiguous KV, then ours on pages."""
    bench = ChunkBench(length, prefix)
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if not prefix else ()
    for backend in backends:
        with sdpa_kernel(backend):
            line = bench.measure(backend.name, bench.by_torch, ceilings)
        yield line
    if (by_gluon := bench.by_gluon()) is not None:
        bench.out.fill_(float("nan"))
        yield bench.measure("paged Gluon", by_gluon, ceilings)
    for tiles in tilings:
        bench.out.fill_(float("nan"))
        yield bench.measure("paged Triton", bench.by_triton(tiles), ceilings, f" {tiles}")


def run_prompts(count: int, length: int, ceilings: Ceilings) -> Iterator[Line]:
    """Several prompts of one length in a launch, Llama's heads: a busy engine's step."""
    width = -(-length // PAGE)
    shape = (2, count * width, KV_HEADS, PAGE, DIM)
    cache = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    tables = torch.randperm(count * width, device="cuda", dtype=torch.int32).view(count, width)
    query = torch.randn(count * length, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    floor = count * 2 * HEADS * DIM * length * length / ceilings.matmul
    starts = torch.zeros(count, dtype=torch.int32, device="cuda")
    row_starts = length * torch.arange(count + 1, dtype=torch.int32, device="cuda")
    out = torch.empty_like(query)

    def by_triton() -> torch.Tensor:
        chunks = (tables, starts, row_starts, length)
        return paged_extend(query, cache[0], cache[1], *chunks, SCALE, out=out)

    calls = {"paged Triton": by_triton}
    if suits(cache[0], None):
        pages = describe_pages(cache[0], cache[1])
        tiles = torch.tensor(plan_tiles([(0, length)] * count), dtype=torch.int32, device="cuda")
        calls["paged Gluon"] = lambda: extend_from_pages(
            query, pages, tables, tiles, KV_HEADS, SCALE, None, out
        )
    key, value = (
        side[tables[-1]].transpose(1, 2).reshape(-1, KV_HEADS, DIM)[:length].transpose(0, 1)
        for side in cache
    )
    expected = functional.scaled_dot_product_attention(
        query[-length:].transpose(0, 1).float(),
        key.float().repeat_interleave(HEADS // KV_HEADS, 0),
        value.float().repeat_interleave(HEADS // KV_HEADS, 0),
        is_causal=True,
    ).transpose(0, 1)
    for kind, call in calls.items():
        name = f"prefill {count} x {length} {kind}"
        out.fill_(float("nan"))
        error = check(name, call()[-length:], expected, 2e-2)
        seconds = seconds_per_call([call] * 4, 7)
        rate = floor * ceilings.matmul / seconds / 1e12
        yield Line(name, seconds, floor, error, f"{rate:.0f} TFLOP/s")
