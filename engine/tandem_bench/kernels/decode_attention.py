"""Decode attention as a share of copy bandwidth."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from tandem_bench.gpu.device import Ceilings
from tandem_bench.gpu.lines import Line
from tandem_bench.gpu.timing import check, seconds_per_call
from tandem_kernels.attention.decode_kernel import paged_decode
from tandem_kernels.attention.split_plan import make_decode_plan


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
    """A configuration of the decode kernel; None: as the engine's backend has it."""

    tile: int = 64
    warps: int = 4
    stages: int | None = 3
    programs: int | None = 528


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
        seconds = seconds_per_call([partial(call, layer) for layer in layers])
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
