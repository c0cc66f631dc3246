"""Which kernel the GPU's backend gives a step's chunks to, and with what. Needs no GPU."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tandem_engine.attention import triton_backend
from tandem_engine.attention.backend import Chunk, StepTensors
from tandem_engine.attention.triton_backend import TritonAttention
from tandem_engine.spec.model import ModelSpec

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 16, 16
SPEC = cast(
    ModelSpec,
    SimpleNamespace(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        attention_scale=0.25,
        attention_softcap=None,
        layers=[SimpleNamespace(window=None), SimpleNamespace(window=8)],
    ),
)


class Launches:
    """Stands in for a kernel: keeps its arguments, and writes ones to its rows."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def __call__(self, query: torch.Tensor, *args: Any, **options: Any) -> None:
        out = options.get("out", args[-1])
        assert out.shape == query.shape
        out.fill_(1.0)
        self.given.append((query, *args))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launches]:
    found = {name: Launches() for name in ("paged_extend", "extend_from_pages")}
    for name, launches in found.items():
        monkeypatch.setattr(triton_backend, name, launches)
    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(triton_backend, "is_supported", lambda: True)
    return found


def make_step(chunks: list[tuple[int, int]]) -> StepTensors:
    """`chunks`: (start, tokens); no decodes."""
    total, made, row = sum(tokens for _, tokens in chunks), [], 0
    widths = [-(-(start + tokens) // PAGE) for start, tokens in chunks]
    tables = torch.zeros(len(chunks), max(widths), dtype=torch.int64)
    for (start, tokens), width, table in zip(chunks, widths, tables, strict=True):
        table[:width] = torch.arange(width)
        made.append(Chunk(row, tokens, start))
        row += tokens
    zeros = torch.zeros(total, dtype=torch.int64)
    none = torch.zeros((0, 1), dtype=torch.int32)
    return StepTensors(zeros, zeros, zeros, zeros, none, none[:, 0], tuple(made), tables)


def attend(
    monkeypatch: pytest.MonkeyPatch, suits: bool, chunks: list[tuple[int, int]]
) -> torch.Tensor:
    monkeypatch.setattr(triton_backend, "suits", lambda cache, softcap: suits)
    backend = TritonAttention(SPEC, torch.zeros(2, 2, 40, KV_HEADS, PAGE, DIM).bfloat16())
    step = make_step(chunks)
    backend.plan(step)
    padded = torch.zeros(step.positions.shape[0] + 3, HEADS, DIM).bfloat16()
    found = torch.zeros(padded.shape[0], HEADS * DIM).bfloat16()
    for layer in range(2):
        found = backend.attend(layer, padded, found)
    return found


def test_all_chunks_are_one_launch_on_hopper(
    kernels: dict[str, Launches], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = attend(monkeypatch, True, [(16, 130), (0, 5)])
    assert found[:135].all()
    assert not found[135:].any()
    assert not kernels["paged_extend"].given
    first, second = kernels["extend_from_pages"].given
    query, pages, tables, tiles, num_kv_heads, scale, window, _ = first
    assert query.shape == (135, HEADS, DIM)
    assert tables.shape == (2, 10)
    assert tiles.tolist() == [0, 128, 0, 130, 16, 0, 0, 0, 130, 16, 1, 0, 130, 5, 0]
    assert (num_kv_heads, scale, window, pages.stride_row) == (KV_HEADS, 0.25, None, 32)
    assert second[1].descriptor.base.data_ptr() != pages.descriptor.base.data_ptr()
    assert second[6] == 8


@pytest.mark.parametrize(
    ("suits", "chunks"), [(False, [(16, 130), (0, 5)]), (True, [(16, 64), (0, 5)])]
)
def test_other_devices_and_short_chunks_take_the_paged_kernel(
    kernels: dict[str, Launches],
    monkeypatch: pytest.MonkeyPatch,
    suits: bool,
    chunks: list[tuple[int, int]],
) -> None:
    rows = chunks[0][1]
    attend(monkeypatch, suits, chunks)
    assert not kernels["extend_from_pages"].given
    query, _, _, tables, starts, row_starts, longest, *limits = kernels["paged_extend"].given[0]
    assert query.shape[0] == rows + 5
    assert tables.dtype == torch.int32
    assert (starts.tolist(), row_starts.tolist(), longest) == ([16, 0], [0, rows, rows + 5], rows)
    assert limits == [0.25, None, None]
