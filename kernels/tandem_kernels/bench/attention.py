"""Decode attention as a share of copy bandwidth, prefill attention beside torch's own."""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tandem_kernels.attention.decode_kernel import paged_decode
from tandem_kernels.attention.extend_kernel import paged_extend
from tandem_kernels.attention.hopper_extend import (
    describe_pages,
    extend_from_pages,
    plan_tiles,
    suits,
)
from tandem_kernels.attention.split_plan import make_decode_plan
from tandem_kernels.bench.timing import Ceilings, Line, check, seconds_per_call


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """Llama-3.1-8B's heads unless said otherwise."""

    batch: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page: int = 64
    window: int | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def kv_bytes(self) -> int:
        """What one call reads."""
        seen = min(self.context, self.window or self.context)
        size = self.dtype.itemsize
        return 2 * self.batch * seen * self.kv_heads * self.head_dim * size

    @property
    def name(self) -> str:
        """For the table."""
        more = f" window {self.window}" if self.window else ""
        kind = " fp8" if self.dtype.itemsize == 1 else ""
        return f"decode {self.batch} x {self.context} page {self.page}{kind}{more}"


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """A configuration of the decode kernel."""

    tile: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 528


class DecodeBench:
    """Buffers of one case, several layers of them so that the L2 holds nothing of the next call."""

    def __init__(self, case: DecodeCase) -> None:
        self.case = case
        per_row = -(-case.context // case.page)
        num_blocks = case.batch * per_row
        layers = max(1, min(32, (512 << 20) // case.kv_bytes))
        shape = (layers, 2, num_blocks, case.kv_heads, case.page, case.head_dim)
        cache = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        for layer in cache:
            layer.normal_()
        self.caches = cache.to(case.dtype) if case.dtype != cache.dtype else cache
        order = torch.randperm(num_blocks, device="cuda", dtype=torch.int32)
        self.tables = order.view(case.batch, per_row)
        self.lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
        sizes = (case.batch, case.heads, case.head_dim)
        self.query = torch.randn(sizes, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.query)
        self.scale = case.head_dim**-0.5

    def expected(self, rows: int = 4) -> torch.Tensor:
        """Float32 attention of the first rows over layer 0."""
        case, found = self.case, []
        raw = self.caches.view(torch.uint8) if case.dtype.itemsize == 1 else self.caches
        first = 0 if case.window is None else max(0, case.context - case.window)
        for row in range(min(rows, case.batch)):
            keys, values = (
                raw[0, side][self.tables[row]]
                .view(case.dtype)
                .float()
                .transpose(1, 2)
                .reshape(-1, case.kv_heads, case.head_dim)[first : case.context]
                .repeat_interleave(case.heads // case.kv_heads, dim=1)
                for side in range(2)
            )
            scores = torch.einsum("hd,shd->hs", self.query[row].float(), keys) * self.scale
            found.append(torch.einsum("hs,shd->hd", scores.softmax(-1), values))
        return torch.stack(found)

    def run(self, tiles: DecodeTiles, expected: torch.Tensor, ceilings: Ceilings) -> Line:
        """Check, then time."""
        case = self.case
        plan = make_decode_plan(
            self.lengths,
            self.tables,
            case.heads,
            case.kv_heads,
            case.head_dim,
            window=case.window,
            tile=tiles.tile,
            programs=tiles.programs,
        )
        plan.refill()

        def call(layer: int) -> torch.Tensor:
            return paged_decode(
                self.query,
                self.caches[layer, 0],
                self.caches[layer, 1],
                plan,
                self.out,
                self.scale,
                warps=tiles.warps,
                stages=tiles.stages,
            )

        self.out.fill_(float("nan"))
        found = call(0)
        if not bool(found.isfinite().all()):
            found = found * float("nan")
        error = check(case.name, found[: expected.shape[0]], expected, 2e-2)
        layers = range(self.caches.shape[0])
        seconds = seconds_per_call([lambda n=n: call(n) for n in layers])  # type: ignore[misc]
        rate = f"{case.kv_bytes / seconds / 1e12:.2f} TB/s {tiles}"
        return Line(case.name, seconds, case.kv_bytes / ceilings.copy, error, rate)


DECODE_CASES = [
    DecodeCase(1, 1024),
    DecodeCase(1, 4096),
    DecodeCase(1, 32768),
    DecodeCase(32, 1024),
    DecodeCase(32, 8192),
    DecodeCase(256, 1024),
    DecodeCase(64, 1024),
    replace(DecodeCase(32, 8192), page=16),
    replace(DecodeCase(32, 8192), window=1024),
    replace(DecodeCase(32, 8192), dtype=torch.float8_e4m3fn),
    replace(DecodeCase(32, 4096), heads=28, kv_heads=4),
]


def run_prefill(
    length: int, ceilings: Ceilings, tilings: list[tuple[int, int, int, int]], prefix: int = 0
) -> list[Line]:
    """One causal chunk of Llama's heads: torch's backends on contiguous KV, then our tilings."""
    heads, kv_heads, dim, page = 32, 8, 128, 64
    total = prefix + length
    query = torch.randn(length, heads, dim, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(
        2, -(-total // page), kv_heads, page, dim, device="cuda", dtype=torch.bfloat16
    )
    table = torch.randperm(cache.shape[1], device="cuda", dtype=torch.int32)[None]
    key, value = (
        side[table[0]].transpose(1, 2).reshape(-1, kv_heads, dim)[:total].transpose(0, 1)[None]
        for side in cache
    )
    rows = query.transpose(0, 1)[None]
    flops = 4 * heads * dim * (length * prefix + length * length / 2)
    floor = flops / ceilings.matmul
    lines: list[Line] = []
    mask = torch.arange(total, device="cuda") <= torch.arange(prefix, total, device="cuda")[:, None]
    some = slice(max(0, length - 200), length)
    expected = functional.scaled_dot_product_attention(
        rows[:, :, some].float(),
        key.float().repeat_interleave(4, 1),
        value.float().repeat_interleave(4, 1),
        attn_mask=mask[some],
    )[0].transpose(0, 1)
    name = f"prefill {prefix}+{length}"
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if not prefix else ()
    for backend in backends:
        with sdpa_kernel(backend):

            def torch_call() -> torch.Tensor:
                return functional.scaled_dot_product_attention(
                    rows, key, value, is_causal=True, enable_gqa=True
                )

            error = check(name, torch_call()[0].transpose(0, 1)[some], expected, 2e-2)
            seconds = seconds_per_call([torch_call] * 2, 7)
        note = f"{flops / seconds / 1e12:.0f} TFLOP/s"
        lines.append(Line(f"{name} {backend.name}", seconds, floor, error, note))
    out = torch.empty_like(query)
    if suits(cache[0], None):
        pages = describe_pages(cache[0], cache[1])
        tiles = torch.tensor(plan_tiles([(prefix, length)]), dtype=torch.int32, device="cuda")

        def from_pages() -> torch.Tensor:
            return extend_from_pages(query, pages, table, tiles, kv_heads, dim**-0.5, None, out)

        out.fill_(float("nan"))
        error = check(name, from_pages()[some], expected, 2e-2)
        seconds = seconds_per_call([from_pages] * 2, 7)
        note = f"{flops / seconds / 1e12:.0f} TFLOP/s"
        lines.append(Line(f"{name} paged Gluon", seconds, floor, error, note))
    starts = torch.tensor([prefix], dtype=torch.int32, device="cuda")
    row_starts = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    for block_m, tile, warps, stages in tilings:

        def call(
            block_m: int = block_m, tile: int = tile, warps: int = warps, stages: int = stages
        ) -> torch.Tensor:
            return paged_extend(
                query, cache[0], cache[1], table, starts, row_starts, length, dim**-0.5,
                out=out, block_m=block_m, tile=tile, warps=warps, stages=stages,
            )  # fmt: skip

        out.fill_(float("nan"))
        error = check(name, call()[some], expected, 2e-2)
        seconds = seconds_per_call([call] * 2, 7)
        note = f"{flops / seconds / 1e12:.0f} TFLOP/s {(block_m, tile, warps, stages)}"
        lines.append(Line(f"{name} paged Triton", seconds, floor, error, note))
    return lines


def run_prompts(count: int, length: int, ceilings: Ceilings) -> list[Line]:
    """Several prompts of one length in a launch, Llama's heads: a busy engine's step."""
    heads, kv_heads, dim, page = 32, 8, 128, 64
    width = -(-length // page)
    shape = (2, count * width, kv_heads, page, dim)
    cache = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    tables = torch.randperm(count * width, device="cuda", dtype=torch.int32).view(count, width)
    query = torch.randn(count * length, heads, dim, device="cuda", dtype=torch.bfloat16)
    floor = count * 2 * heads * dim * length * length / ceilings.matmul
    starts = torch.zeros(count, dtype=torch.int32, device="cuda")
    row_starts = length * torch.arange(count + 1, dtype=torch.int32, device="cuda")
    out, scale = torch.empty_like(query), dim**-0.5

    def by_triton() -> torch.Tensor:
        chunks = (tables, starts, row_starts, length)
        return paged_extend(query, cache[0], cache[1], *chunks, scale, out=out)

    calls = {"paged Triton": by_triton}
    if suits(cache[0], None):
        pages = describe_pages(cache[0], cache[1])
        tiles = torch.tensor(plan_tiles([(0, length)] * count), dtype=torch.int32, device="cuda")
        calls["paged Gluon"] = lambda: extend_from_pages(
            query, pages, tables, tiles, kv_heads, scale, None, out
        )
    key, value = (
        side[tables[-1]].transpose(1, 2).reshape(-1, kv_heads, dim)[:length].transpose(0, 1)
        for side in cache
    )
    expected = functional.scaled_dot_product_attention(
        query[-length:].transpose(0, 1).float(),
        key.float().repeat_interleave(heads // kv_heads, 0),
        value.float().repeat_interleave(heads // kv_heads, 0),
        is_causal=True,
    ).transpose(0, 1)
    lines: list[Line] = []
    for kind, call in calls.items():
        name = f"prefill {count} x {length} {kind}"
        out.fill_(float("nan"))
        error = check(name, call()[-length:], expected, 2e-2)
        seconds = seconds_per_call([call] * 4, 7)
        rate = floor * ceilings.matmul / seconds / 1e12
        lines.append(Line(name, seconds, floor, error, f"{rate:.0f} TFLOP/s"))
    return lines
