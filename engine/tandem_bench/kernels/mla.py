"""Multi-head latent attention: decode against copy and matmul, prefill against matmul."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tandem_bench.gpu.device import Ceilings
from tandem_bench.gpu.lines import Line
from tandem_bench.gpu.timing import check, seconds_per_call
from tandem_kernels.mla import reference, write_kernel
from tandem_kernels.mla.decode_kernel import Kind, make_mla_plan, paged_mla_decode
from tandem_kernels.mla.extend_kernel import attend_projected

RANK, ROPE, NOPE, VALUE = 512, 64, 128, 128


@dataclass(frozen=True, slots=True)
class MlaTiles:
    """A configuration of the decode kernel."""

    tile: int
    warps: int
    stages: int
    programs: int
    kind: Kind
    min_tiles: int = 1
    overlap: bool = False


@dataclass(frozen=True, slots=True)
class MlaCall:
    """Parameters of the decode kernel's call; None: what was fastest on an H100."""

    kind: Kind | None = None
    warps: int | None = None
    stages: int | None = None
    overlap: bool = False


@dataclass(frozen=True, slots=True)
class MlaCase:
    """DeepSeek's dimensions; 16 heads are V2-Lite's (or V3's on 8 devices), 128 those of V2, V3."""

    batch: int
    context: int
    heads: int
    page: int = 64

    @property
    def kv_bytes(self) -> int:
        """What one call must read."""
        return self.batch * self.context * (RANK + ROPE) * 2

    @property
    def flops(self) -> int:
        """Scores over all of a latent, values over its rank."""
        return 2 * self.batch * self.context * self.heads * (2 * RANK + ROPE)

    def floor(self, ceilings: Ceilings) -> float:
        """The longer of both, seconds."""
        return max(self.kv_bytes / ceilings.copy, self.flops / ceilings.matmul)

    @property
    def name(self) -> str:
        """For the table."""
        return f"MLA decode {self.batch} x {self.context}, {self.heads} heads, page {self.page}"


class MlaBench:
    """Buffers of one case, several layers of them so that the L2 holds nothing of the next call."""

    def __init__(self, case: MlaCase, num_layers: int = 64) -> None:
        self.case = case
        per_row = -(-case.context // case.page)
        num_blocks = case.batch * per_row
        layers = max(1, min(num_layers, (400 << 20) // case.kv_bytes))
        shape = (layers, num_blocks, 1, case.page, RANK + ROPE)
        self.caches = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        for layer in self.caches:
            layer.normal_()
        order = torch.randperm(num_blocks, device="cuda", dtype=torch.int32)
        self.tables = order.view(case.batch, per_row)
        self.lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
        query = torch.randn(case.batch, case.heads, RANK + ROPE, device="cuda")
        self.query = (query * 2).bfloat16()
        self.out = torch.empty((case.batch, case.heads, RANK), device="cuda", dtype=torch.bfloat16)
        self.scale = (NOPE + ROPE) ** -0.5
        some = self.query[:4].float()
        self.expected = reference.decode_attention(
            some[..., :RANK],
            some[..., RANK:],
            self.caches[0].float() if case.batch <= 8 else self._rows(),
            self.tables[:4] if case.batch <= 8 else self._row_tables(),
            self.lengths[:4],
            self.scale,
        )

    def _rows(self) -> torch.Tensor:
        """The pages of the first sequences in float32, in the order of `_row_tables`."""
        return self.caches[0][self.tables[:4].flatten().long()].float()

    def _row_tables(self) -> torch.Tensor:
        return torch.arange(4 * self.tables.shape[1], device="cuda").view(4, -1)

    def prepare(self, tiles: MlaTiles | None) -> Callable[[int], torch.Tensor]:
        """A call of the kernel on one of the layers; None: as it is shipped."""
        case, lengths, tables = self.case, self.lengths, self.tables
        if tiles is None:
            plan = make_mla_plan(lengths, tables, case.heads, RANK)
            chosen = MlaCall(overlap=True)
        else:
            plan = make_mla_plan(
                lengths,
                tables,
                case.heads,
                RANK,
                tile=tiles.tile,
                programs=tiles.programs,
                min_tiles=tiles.min_tiles,
            )
            chosen = MlaCall(tiles.kind, tiles.warps, tiles.stages, tiles.overlap)
        plan.refill()

        def call(layer: int) -> torch.Tensor:
            return paged_mla_decode(
                self.query[..., :RANK],
                self.query[..., RANK:],
                self.caches[layer],
                plan,
                self.out,
                self.scale,
                kind=chosen.kind,
                overlap=chosen.overlap,
                warps=chosen.warps,
                stages=chosen.stages,
            )

        return call

    def run(self, tiles: MlaTiles | None, ceilings: Ceilings) -> Line:
        """Check, then time; None: as it is shipped."""
        case, call = self.case, self.prepare(tiles)
        self.out.fill_(float("nan"))
        error = check(case.name, call(0)[:4], self.expected, 2e-2)
        calls = [partial(call, layer) for layer in range(self.caches.shape[0])]
        seconds = seconds_per_call(calls * (1 if len(calls) > 4 else 4), 9)
        note = (
            f"{case.kv_bytes / seconds / 1e12:.2f} TB/s {case.flops / seconds / 1e12:.0f} TFLOP/s"
            f" {tiles or ''}"
        )
        return Line(case.name, seconds, case.floor(ceilings), error, note)


CASES = [MlaCase(batch, 4096, heads) for heads in (16, 128) for batch in (128, 32, 1)] + [
    MlaCase(32, 4096, 16, page=16)
]


def run_write(num_tokens: int, heads: int, ceilings: Ceilings) -> list[Line]:
    """Norm, rotations and the paged write: latents and queries read and written."""
    page, num_blocks = 64, -(-num_tokens // 64)
    latents = torch.randn(num_tokens, RANK + ROPE, device="cuda", dtype=torch.bfloat16)
    wide = torch.randn(num_tokens, heads, NOPE + ROPE, device="cuda", dtype=torch.bfloat16)
    query = wide[..., NOPE:]
    angles = torch.rand(num_tokens, ROPE // 2, device="cuda") * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    weight = torch.randn(RANK, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(num_tokens, device="cuda")
    blocks = torch.randperm(num_blocks, device="cuda")[positions // page]
    caches = torch.full(
        (2, num_blocks, 1, page, RANK + ROPE), float("nan"), device="cuda", dtype=torch.bfloat16
    )
    tensors = (latents, query, weight, cos, sin)
    places = (blocks, positions % page, 1e-6)
    expected = reference.rope_and_write(*tensors, caches[1], *places)
    out = torch.full_like(expected, float("nan"))
    moved = 2 * latents.nbytes + 2 * out.nbytes + cos.nbytes + sin.nbytes
    lines = []
    for block_heads, whole in ((16, False), (16, True), (64, False), (32, True), (128, True)):
        if block_heads > heads:
            continue

        def call(block_heads: int = block_heads, whole: bool = whole) -> torch.Tensor:
            return write_kernel.rope_and_write(
                *tensors, caches[0], *places, out=out, block_heads=block_heads, whole=whole
            )

        error = check("MLA write", call(), expected, 2e-2)
        check("MLA write pages", caches[0].nan_to_num(), caches[1].nan_to_num(), 1e-2)
        seconds = seconds_per_call([call] * 5)
        name = f"MLA write {num_tokens}, {heads} heads"
        note = f"block_heads {block_heads}{' whole' if whole else ''}"
        lines.append(Line(name, seconds, moved / ceilings.copy, error, note))
    return lines


EXTEND_TILES = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 1), (64, 64, 4, 3), (128, 32, 8, 4),
                (64, 64, 4, 2), (128, 128, 8, 2)]  # fmt: skip


def run_extend(length: int, heads: int, ceilings: Ceilings, prefix: int = 0) -> list[Line]:
    """Causal attention of one chunk over projected keys and values, beside torch's backends."""
    total = prefix + length
    query = torch.randn(length, heads, NOPE + ROPE, device="cuda", dtype=torch.bfloat16)
    projected = torch.randn(total, heads, NOPE + VALUE, device="cuda", dtype=torch.bfloat16)
    rope_keys = torch.randn(total, RANK + ROPE, device="cuda", dtype=torch.bfloat16)[:, RANK:]
    scale = (NOPE + ROPE) ** -0.5
    flops = 2 * heads * (NOPE + ROPE + VALUE) * (length * prefix + length * length / 2)
    some = slice(max(0, length - 100), length)
    shared = rope_keys[:, None].expand(-1, heads, -1)
    keys = torch.cat((projected[..., :NOPE], shared), dim=-1).transpose(0, 1)[None]
    values = projected[..., NOPE:].transpose(0, 1)[None]
    rows = query.transpose(0, 1)[None]
    mask = torch.arange(total, device="cuda") <= torch.arange(prefix, total, device="cuda")[:, None]
    expected = functional.scaled_dot_product_attention(
        rows[:, :, some].float(), keys.float(), values.float(), mask[some], scale=scale
    )[0].transpose(0, 1)
    name = f"MLA prefill {prefix}+{length}, {heads} heads"
    lines = []

    def add(kind: str, call: Callable[[], torch.Tensor]) -> None:
        error = check(name, call()[some], expected, 2e-2)
        seconds = seconds_per_call([call] * 2, 7)
        note = f"{kind}, {flops / seconds / 1e12:.0f} TFLOP/s"
        lines.append(Line(name, seconds, flops / ceilings.matmul, error, note))

    def torch_call() -> torch.Tensor:
        found = functional.scaled_dot_product_attention(
            rows, keys, values, is_causal=True, scale=scale
        )
        return found[0].transpose(0, 1)

    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        if prefix:
            break
        try:
            with sdpa_kernel(backend):
                add(backend.name, torch_call)
        except RuntimeError as error:
            print(f"{name} {backend.name}: {str(error).splitlines()[0]}", flush=True)
    out = torch.empty((length, heads, VALUE), device="cuda", dtype=torch.bfloat16)
    for tiles in EXTEND_TILES:
        block_m, tile, warps, stages = tiles
        call = partial(
            attend_projected, query, projected, rope_keys, prefix, scale, out,
            block_m=block_m, tile=tile, warps=warps, stages=stages,
        )  # fmt: skip
        out.fill_(float("nan"))
        try:
            add(f"Triton {tiles}", call)
        except triton.runtime.errors.OutOfResources:
            continue
    return lines
