"""Paged decode attention and its plan against float64, for odd shapes and lengths."""

from typing import Any

import pytest
import torch

from tandem_kernels.attention import split_plan
from tandem_kernels.attention.decode_kernel import paged_decode
from tandem_kernels.attention.split_plan import DecodePlan, make_decode_plan
from tandem_kernels.tests.paged_case import attend_exactly, make_case, relative_error

LENGTHS = [1, 3, 64, 65, 200, 333]


def _run(
    device: torch.device,
    lengths: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    page: int,
    dtype: torch.dtype,
    **options: Any,
) -> tuple[float, DecodePlan]:
    window, softcap = options.pop("window", None), options.pop("softcap", None)
    fused = options.pop("fused", True)
    case = make_case(lengths, kv_heads, head_dim, page, dtype, device)
    scale = head_dim**-0.5
    qkv = torch.randn(len(lengths), heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    query = qkv[:, :heads]
    out = torch.full((len(lengths), heads, head_dim), float("nan"), dtype=dtype, device=device)
    plan = make_decode_plan(
        torch.tensor(lengths, dtype=torch.int32, device=device),
        case.block_tables,
        heads,
        kv_heads,
        head_dim,
        window=window,
        **options,
    )
    plan.partial_out.fill_(float("nan"))
    plan.partial_lse.fill_(float("nan"))
    plan.refill()
    found = paged_decode(
        query, case.key_cache, case.value_cache, plan, out, scale, softcap, fused=fused
    )
    assert not plan.arrivals.any()
    expected = torch.stack(
        [
            attend_exactly(query[i : i + 1], k, v, k.shape[0] - 1, scale, window, softcap)[0]
            for i, (k, v) in enumerate(zip(case.keys, case.values, strict=True))
        ]
    )
    return relative_error(found, expected), plan


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page"),
    [(8, 2, 128, 64), (7, 1, 64, 16), (4, 4, 32, 64), (4, 1, 256, 64), (6, 2, 80, 16)],
)
@pytest.mark.parametrize("wide", [True, False])
def test_matches_float64(
    device: torch.device,
    half: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page: int,
    wide: bool,
) -> None:
    dtype = torch.float32 if wide else half
    error, _ = _run(device, LENGTHS, heads, kv_heads, head_dim, page, dtype, programs=24)
    assert error < (1e-5 if wide else 2e-2)


def test_a_plan_is_as_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_plan, "tuned_decode", lambda *shape: [64, 5, 1])
    lengths = torch.tensor([70], dtype=torch.int32)
    tables = torch.zeros((1, 2), dtype=torch.int32)
    plan = make_decode_plan(lengths, tables, 8, 2, 64)
    assert (plan.target, plan.stages, plan.fused) == (32, 5, True)
    plan = make_decode_plan(lengths, tables, 8, 2, 64, programs=8)
    assert (plan.target, plan.stages, plan.fused) == (4, None, None)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8, 16, 32, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (28, 4)])
def test_what_the_table_chooses(batch: int, heads: int, kv_heads: int) -> None:
    torch.manual_seed(batch)
    lengths = torch.randint(1, 3000, (batch,)).tolist()
    device = torch.device("cuda")
    error, _ = _run(device, lengths, heads, kv_heads, 128, 64, torch.bfloat16, fused=None)
    assert error < 2e-2


@pytest.mark.parametrize("window", [1, 17, 64, 100, 1000])
def test_window(device: torch.device, window: int | None) -> None:
    error, _ = _run(device, LENGTHS, 8, 2, 64, 16, torch.float32, window=window, programs=16)
    assert error < 1e-5


def test_softcap(device: torch.device) -> None:
    error, _ = _run(device, LENGTHS, 8, 2, 64, 64, torch.float32, softcap=1.5)
    assert error < 1e-5


@pytest.mark.parametrize("tile", [32, 64, 128])
@pytest.mark.parametrize("programs", [1, 8, 300])
@pytest.mark.parametrize("fused", [True, False])
def test_every_cut_gives_the_same(
    device: torch.device, tile: int, programs: int, fused: bool
) -> None:
    error, plan = _run(
        device, LENGTHS, 4, 2, 64, 64, torch.float32, tile=tile, programs=programs, fused=fused
    )
    assert error < 1e-5
    counts = plan.requests[:, 1]
    assert int(counts.sum()) <= plan.units.shape[0]
    # The units tile each sequence without gap or overlap.
    units = plan.units[plan.units[:, 0] >= 0].cpu()
    for row, length in enumerate(LENGTHS):
        mine = units[units[:, 0] == row]
        assert mine[:, 1].tolist() == [0, *mine[:-1, 2].tolist()]
        assert int(mine[-1, 2]) == length


def test_padding_rows_give_zeros(device: torch.device) -> None:
    case = make_case([70], 2, 64, 16, torch.float32, device)
    tables = torch.zeros(3, case.block_tables.shape[1], dtype=torch.int32, device=device)
    tables[1] = case.block_tables[0]
    lengths = torch.tensor([0, 70, 0], dtype=torch.int32, device=device)
    plan = make_decode_plan(lengths, tables, 4, 2, 64)
    plan.refill()
    query = torch.randn(3, 4, 64, device=device)
    out = torch.full_like(query, float("nan"))
    paged_decode(query, case.key_cache, case.value_cache, plan, out, 0.125)
    expected = attend_exactly(query[1:2], case.keys[0], case.values[0], 69, 0.125, None, None)
    assert relative_error(out[1:2], expected) < 1e-5
    assert not out[0].any()
    assert not out[2].any()


def test_float8_keys_and_values(device: torch.device) -> None:
    lengths, dtype = [130, 65], torch.float8_e4m3fn
    case = make_case(lengths, 2, 64, 64, torch.float32, device)
    scales = (0.05, 0.04)
    keys8 = (case.key_cache.nan_to_num() / scales[0]).to(dtype)
    values8 = (case.value_cache.nan_to_num() / scales[1]).to(dtype)
    query = torch.randn(2, 4, 64, device=device)
    plan = make_decode_plan(
        torch.tensor(lengths, dtype=torch.int32, device=device), case.block_tables, 4, 2, 64
    )
    plan.refill()
    found, expected = torch.full_like(query, float("nan")), torch.full_like(query, float("nan"))
    paged_decode(
        query, keys8, values8, plan, found, 0.125, key_scale=scales[0], value_scale=scales[1]
    )
    exact = (keys8.float() * scales[0], values8.float() * scales[1])
    paged_decode(query, *exact, plan, expected, 0.125)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(("head_dim", "page", "tile"), [(128, 64, 64), (64, 16, 32), (80, 16, 64)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e5])
def test_float8_with_a_16_bit_query(
    device: torch.device, half: torch.dtype, head_dim: int, page: int, tile: int, size: float
) -> None:
    """Every float8 and queries far outside of float16's good range: as exact as 16 bits are."""
    if half == torch.float16:
        size = min(max(size, 1e-3), 1e3)
    lengths, dtype = [1, 130, 65], torch.float8_e4m3fn
    case = make_case(lengths, 2, head_dim, page, torch.float32, device)
    bits = torch.randint(0, 127, case.key_cache.shape, device=device)
    sign = torch.randint(0, 2, case.key_cache.shape, device=device) * 128
    keys8 = (bits + sign).to(torch.uint8).view(dtype)
    values8 = keys8.view(torch.uint8).roll(1, 0).view(dtype)
    query = (torch.randn(3, 8, head_dim, device=device) * size).to(half)
    scale = 0.05 / size / head_dim**0.5
    plan = make_decode_plan(
        torch.tensor(lengths, dtype=torch.int32, device=device), case.block_tables, 8, 2,
        head_dim, tile=tile, programs=8,
    )  # fmt: skip
    plan.refill()
    found = torch.full_like(query, float("nan"), dtype=torch.float32)
    paged_decode(query, keys8, values8, plan, found, scale, key_scale=0.5, value_scale=0.25)
    expected = torch.full_like(found, float("nan"))
    exact = (keys8.float() * 0.5, values8.float() * 0.25)
    paged_decode(query.float(), *exact, plan, expected, scale)
    assert relative_error(found, expected) < 1e-3


@pytest.mark.gpu
def test_offsets_beyond_int32() -> None:
    """A cache of more than 2³¹ elements: its last blocks must be reached."""
    device = torch.device("cuda")
    shape = (140_000, 2, 64, 128)
    key_cache = torch.empty(shape, dtype=torch.bfloat16, device=device)
    value_cache = torch.empty(shape, dtype=torch.bfloat16, device=device)
    tables = torch.tensor([[139_999, 139_998]], dtype=torch.int32, device=device)
    for block in tables[0].tolist():
        key_cache[block].normal_()
        value_cache[block].normal_()
    lengths = torch.tensor([128], dtype=torch.int32, device=device)
    plan = make_decode_plan(lengths, tables, 8, 2, 128)
    plan.refill()
    query = torch.randn(1, 8, 128, device=device, dtype=torch.bfloat16)
    out = torch.full_like(query, float("nan"))
    paged_decode(query, key_cache, value_cache, plan, out, 0.1)
    keys = torch.cat([key_cache[b].transpose(0, 1) for b in tables[0].tolist()])
    values = torch.cat([value_cache[b].transpose(0, 1) for b in tables[0].tolist()])
    assert relative_error(out, attend_exactly(query, keys, values, 127, 0.1, None, None)) < 2e-2
