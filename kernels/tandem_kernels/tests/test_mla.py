"""Multi-head latent attention over pages against float64, for odd shapes and lengths."""

from typing import Any

import pytest
import torch

from tandem_kernels import mla
from tandem_kernels.mla import reference, write_kernel
from tandem_kernels.mla.decode_kernel import make_mla_plan, paged_mla_decode
from tandem_kernels.mla.extend_kernel import attend_projected
from tandem_kernels.tests.paged_case import make_case, relative_error

NAN = float("nan")


def _exactly(query: torch.Tensor, latents: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
    """float64 attention of [H, W] over [S, W]: [H, R]."""
    scores = query.double() @ latents.double().T * scale
    return scores.softmax(-1) @ latents[:, :rank].double()


def _decode(
    device: torch.device,
    lengths: list[int],
    heads: int,
    rank: int,
    rope: int,
    page: int,
    dtype: torch.dtype,
    programs: int = 8,
    tile: int = 64,
    **options: Any,
) -> float:
    case = make_case(lengths, 1, rank + rope, page, dtype, device)
    scale = (rank + rope) ** -0.5
    query = torch.randn(len(lengths), heads, rank + rope, device=device).to(dtype)
    out = torch.full((len(lengths), heads, rank), NAN, dtype=dtype, device=device)
    plan = make_mla_plan(
        torch.tensor(lengths, dtype=torch.int32, device=device),
        case.block_tables,
        heads,
        rank,
        tile=tile,
        programs=programs,
    )
    plan.partial_out.fill_(NAN)
    plan.partial_lse.fill_(NAN)
    plan.refill()
    found = paged_mla_decode(
        query[..., :rank], query[..., rank:], case.key_cache, plan, out, scale, **options
    )
    expected = torch.stack(
        [_exactly(q, k[:, 0], rank, scale) for q, k in zip(query, case.keys, strict=True)]
    )
    return relative_error(found, expected)


LENGTHS = {1: [333], 3: [1, 65, 200], 17: [1, 2, 15, 16, 17, 63, 64, 65, 127, *[30] * 7, 300]}


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize(("heads", "rank", "rope"), [(4, 32, 8), (16, 64, 16), (128, 64, 16)])
@pytest.mark.parametrize("wide", [True, False])
def test_decode_matches_float64(
    device: torch.device,
    half: torch.dtype,
    batch: int,
    page: int,
    heads: int,
    rank: int,
    rope: int,
    wide: bool,
) -> None:
    error = _decode(
        device, LENGTHS[batch], heads, rank, rope, page, torch.float32 if wide else half
    )
    assert error < (1e-5 if wide else 2e-2)


@pytest.mark.parametrize("heads", [16, 20, 128])
def test_decode_with_the_models_dimensions(
    device: torch.device, half: torch.dtype, heads: int
) -> None:
    assert _decode(device, [70, 129], heads, 512, 64, 64, half, programs=4) < 2e-2


@pytest.mark.parametrize("tile", [16, 32, 64, 128])
@pytest.mark.parametrize("programs", [1, 9, 300])
@pytest.mark.parametrize("kind", ["columns", "rows"])
def test_every_cut_gives_the_same(
    device: torch.device, half: torch.dtype, tile: int, programs: int, kind: str
) -> None:
    error = _decode(device, [1, 3, 64, 65, 333], 16, 64, 16, 64, half, programs, tile, kind=kind)
    assert error < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["hopper", "rows"])
@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("programs", [1, 9, 264])
def test_many_heads_on_hopper(kind: str, page: int, programs: int) -> None:
    device, lengths = torch.device("cuda"), [1, 2, 63, 64, 65, 128, 129, 500, 1111]
    torch.manual_seed(3)
    for heads in (64, 128):
        error = _decode(
            device, lengths, heads, 512, 64, page, torch.bfloat16, programs, 64, kind=kind
        )
        assert error < 2e-2


def test_padding_rows_give_zeros(device: torch.device, half: torch.dtype) -> None:
    case = make_case([70], 1, 80, 16, half, device)
    tables = torch.zeros(3, case.block_tables.shape[1], dtype=torch.int32, device=device)
    tables[1] = case.block_tables[0]
    plan = make_mla_plan(torch.tensor([0, 70, 0], dtype=torch.int32, device=device), tables, 16, 64)
    plan.refill()
    query = torch.randn(3, 16, 80, device=device).to(half)
    out = torch.full((3, 16, 64), NAN, dtype=half, device=device)
    paged_mla_decode(query[..., :64], query[..., 64:], case.key_cache, plan, out, 0.1)
    assert relative_error(out[1], _exactly(query[1], case.keys[0][:, 0], 64, 0.1)) < 2e-2
    assert not out[0].any()
    assert not out[2].any()


def test_the_reference_decodes(device: torch.device) -> None:
    lengths = [1, 65, 200]
    case = make_case(lengths, 1, 80, 16, torch.float32, device)
    query = torch.randn(4, 16, 80, device=device)
    tables = torch.zeros(4, case.block_tables.shape[1], dtype=torch.int64, device=device)
    tables[:3] = case.block_tables.clamp(max=case.key_cache.shape[0] - 1)
    counts = torch.tensor([*lengths, 0], device=device)
    found = reference.decode_attention(
        query[..., :64], query[..., 64:], case.key_cache, tables, counts, 0.1
    )
    expected = [_exactly(q, k[:, 0], 64, 0.1) for q, k in zip(query[:3], case.keys, strict=True)]
    assert relative_error(found[:3], torch.stack(expected)) < 1e-5
    assert not found[3].any()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("heads", "rank", "rope"), [(4, 32, 8), (16, 512, 64), (20, 48, 16)])
@pytest.mark.parametrize("whole", [True, False])
def test_write_matches_the_reference(
    device: torch.device, heads: int, rank: int, rope: int, interleaved: bool, whole: bool
) -> None:
    num_tokens, page = 9, 16
    latents = torch.randn(num_tokens, rank + rope + 3, device=device)[:, : rank + rope]
    query = torch.randn(num_tokens, heads, 32 + rope, device=device)[..., 32:]
    angles = torch.rand(num_tokens, rope // 2, device=device) * 6
    blocks = torch.randperm(40, device=device)[:num_tokens]
    blocks[4] = -1  # padding
    offsets = torch.randint(page, (num_tokens,), device=device)
    weight = torch.randn(rank, device=device)
    caches = [torch.full((40, 1, page, rank + rope), NAN, device=device) for _ in range(2)]
    tensors = (latents, query, weight, angles.cos(), angles.sin())
    places = (blocks, offsets, 1e-6, interleaved)
    found = write_kernel.rope_and_write(*tensors, caches[0], *places, block_heads=8, whole=whole)
    expected = reference.rope_and_write(*tensors, caches[1], *places)
    assert relative_error(found, expected) < 1e-5
    assert torch.equal(caches[0].isnan(), caches[1].isnan())
    assert relative_error(caches[0].nan_to_num(), caches[1].nan_to_num()) < 1e-5


def test_rotation_is_by_complex_numbers(device: torch.device) -> None:
    x = torch.randn(3, 2, 8, device=device)
    angles = torch.rand(3, 4, device=device)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_complex(x.view(3, 2, 4, 2)) * turns
    found = reference.rotate(x, angles.cos(), angles.sin(), True)
    assert relative_error(found, torch.view_as_real(pairs).flatten(2)) < 1e-6
    halves = torch.complex(x[..., :4], x[..., 4:]) * turns
    found = reference.rotate(x, angles.cos(), angles.sin(), False)
    assert relative_error(found, torch.cat((halves.real, halves.imag), -1)) < 1e-6


def _extend_exactly(
    query: torch.Tensor,
    latents: torch.Tensor,
    up_projection: torch.Tensor,
    start: int,
    scale: float,
) -> torch.Tensor:
    """float64: every head's keys and values from the latents, one row at a time."""
    rank = up_projection.shape[1]
    heads = query.shape[1]
    size = query.shape[2] - (latents.shape[1] - rank)
    projected = (latents[:, :rank].double() @ up_projection.double().T).unflatten(1, (heads, -1))
    rows = []
    for at, row in enumerate(query.double()):
        seen = slice(0, start + at + 1)
        scores = torch.einsum("hc,shc->hs", row[:, :size], projected[seen, :, :size])
        scores += row[:, size:] @ latents[seen, rank:].double().T
        weights = (scores * scale).softmax(-1)
        rows.append(torch.einsum("hs,shv->hv", weights, projected[seen, :, size:]))
    return torch.stack(rows)


@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 70), (130, 65), (63, 2), (200, 33)])
@pytest.mark.parametrize(("nope", "rope", "value"), [(16, 8, 24), (128, 64, 128)])
@pytest.mark.parametrize("wide", [True, False])
def test_extend_matches_float64(
    device: torch.device,
    half: torch.dtype,
    start: int,
    rows: int,
    nope: int,
    rope: int,
    value: int,
    wide: bool,
) -> None:
    dtype = torch.float32 if wide else half
    heads, rank = 3, 32
    case = make_case([start + rows], 1, rank + rope, 16, dtype, device)
    query = torch.randn(rows, heads, nope + rope, device=device).to(dtype)
    up_projection = (torch.randn(heads * (nope + value), rank, device=device) / 6).to(dtype)
    scale = (nope + rope) ** -0.5
    latents = case.keys[0][:, 0]
    expected = _extend_exactly(query, latents, up_projection, start, scale)
    projected = (latents[:, :rank] @ up_projection.T).view(start + rows, heads, -1)
    out = torch.full((rows, heads, value), NAN, dtype=dtype, device=device)
    attend_projected(query, projected, latents[:, rank:], start, scale, out, block_m=64, tile=32)
    assert relative_error(out, expected) < (1e-5 if wide else 2e-2)
    table = case.block_tables[0].long()[:-1]
    found = mla.extend_attention(query, case.key_cache, table, start, up_projection, scale)
    assert relative_error(found, expected) < (1e-5 if wide else 2e-2)


@pytest.mark.gpu
def test_offsets_beyond_int32() -> None:
    """A cache of more than 2³¹ elements: its last blocks must be reached."""
    device = torch.device("cuda")
    cache = torch.empty(60_000, 1, 64, 576, dtype=torch.bfloat16, device=device)
    tables = torch.tensor([[59_999, 59_998]], dtype=torch.int32, device=device)
    for block in tables[0].tolist():
        cache[block].normal_()
    lengths = torch.tensor([128], dtype=torch.int32, device=device)
    for heads in (16, 128):
        plan = make_mla_plan(lengths, tables, heads, 512)
        plan.refill()
        query = torch.randn(1, heads, 576, device=device, dtype=torch.bfloat16)
        out = torch.full((1, heads, 512), NAN, device=device, dtype=torch.bfloat16)
        paged_mla_decode(query[..., :512], query[..., 512:], cache, plan, out, 0.04)
        latents = torch.cat([cache[b, 0] for b in tables[0].tolist()])
        assert relative_error(out[0], _exactly(query[0], latents, 512, 0.04)) < 2e-2
