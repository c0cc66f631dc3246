"""Attention on a GPU by the Triton kernels; prompts on Hopper by the one in Gluon."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from tandem_engine.attention.backend import AttentionBackend, Chunk, HeadNorms, StepTensors
from tandem_engine.attention.torch_backend import rotate_and_store
from tandem_engine.device import upload
from tandem_engine.spec.model import ModelSpec
from tandem_kernels.attention.decode_kernel import paged_decode
from tandem_kernels.attention.extend_kernel import paged_extend
from tandem_kernels.attention.hopper_extend import (
    FEWEST_ROWS,
    PageRows,
    describe_pages,
    extend_from_pages,
    plan_tiles,
    suits,
)
from tandem_kernels.attention.split_plan import DecodePlan, make_decode_plan
from tandem_kernels.overlap import is_supported


@dataclass(frozen=True, slots=True)
class _Run:
    """A step's chunks for `paged_extend`. Their rows are consecutive: one launch per layer."""

    rows: slice
    tables: torch.Tensor  # [C, M] int32
    starts: torch.Tensor  # [C] int32
    row_starts: torch.Tensor  # [C + 1] int32
    longest: int


@dataclass(frozen=True, slots=True)
class _HopperRun:
    """A step's chunks for `hopper_extend`, in one launch per layer too."""

    rows: slice
    tables: torch.Tensor  # [C, M] int32
    tiles: torch.Tensor  # tiles of rows, as `plan_tiles` makes them


class TritonAttention(AttentionBackend):
    """Decodes with split-KV over the step's own lengths; chunks in tiles of rows.

    A step's `decode_tables` and `decode_lengths` must be int32 views of long-lived buffers, and
    steps of one size must share them: a size's plan is made once, and CUDA graphs keep it.

    Args:
        kv_cache: [layers, 2, N, K, P, D].
    """

    def __init__(self, spec: ModelSpec, kv_cache: torch.Tensor) -> None:
        self._spec = spec
        self._caches = [(layer[0], layer[1]) for layer in kv_cache]
        self._pages: list[PageRows] = []
        if suits(self._caches[0][0], spec.attention_softcap):
            self._pages = [describe_pages(*sides) for sides in self._caches]
        self._windows = [layer.window for layer in spec.layers]
        self._overlap = is_supported()
        self._plans: dict[int, dict[int | None, DecodePlan]] = {}
        self._step: StepTensors | None = None
        self._decode: dict[int | None, DecodePlan] = {}
        self._run: _Run | _HopperRun | None = None

    def plan(self, step: StepTensors) -> None:
        self._step = step
        count = step.num_decodes
        if count:
            if count not in self._plans:
                self._plans[count] = self._make_plans(step)
            self._decode = self._plans[count]
            for plan in self._decode.values():
                plan.refill()
        self._run = self._plan_chunks(step.chunks, step.chunk_tables) if step.chunks else None

    def _make_plans(self, step: StepTensors) -> dict[int | None, DecodePlan]:
        spec = self._spec
        return {
            window: make_decode_plan(
                step.decode_lengths,
                step.decode_tables,
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                window=window,
            )
            for window in set(self._windows)
        }

    def store(
        self,
        layer: int,
        qkv: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        norms: HeadNorms | None,
    ) -> torch.Tensor:
        step = self._step
        assert step is not None, "plan() comes before store()"
        return rotate_and_store(self._spec, qkv, angles, norms, self._caches[layer], step)

    def attend(
        self, layer: int, query: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        step, spec = self._step, self._spec
        assert step is not None, "plan() comes before attend()"
        keys, values = self._caches[layer]
        window = self._windows[layer]
        if out is None:
            out = query.new_empty((query.shape[0], query.shape[1] * query.shape[2]))
        rows = out.view(query.shape)
        count = step.num_decodes
        if count:
            paged_decode(
                query[:count],
                keys,
                values,
                self._decode[window],
                rows[:count],
                spec.attention_scale,
                spec.attention_softcap,
                overlap=self._overlap,
            )
        run, scale = self._run, spec.attention_scale
        if isinstance(run, _HopperRun):
            own, tiles = query[run.rows], (run.tables, run.tiles, spec.num_kv_heads)
            extend_from_pages(own, self._pages[layer], *tiles, scale, window, rows[run.rows])
        elif run is not None:
            chunks = (run.tables, run.starts, run.row_starts, run.longest)
            limits = (scale, window, spec.attention_softcap)
            paged_extend(query[run.rows], keys, values, *chunks, *limits, out=rows[run.rows])
        return out

    def _plan_chunks(self, chunks: Sequence[Chunk], tables: torch.Tensor) -> _Run | _HopperRun:
        """What a launch needs to know of the chunks, on the device."""
        device, tables = tables.device, tables.int()
        sizes = [chunk.num_tokens for chunk in chunks]
        rows = slice(chunks[0].row, chunks[0].row + sum(sizes))
        if self._pages and max(sizes) >= FEWEST_ROWS:
            tiles = plan_tiles([(chunk.start, chunk.num_tokens) for chunk in chunks])
            return _HopperRun(rows, tables, upload(tiles, torch.int32, device))
        return _Run(
            rows,
            tables,
            starts=upload([chunk.start for chunk in chunks], torch.int32, device),
            row_starts=upload([0, *accumulate(sizes)], torch.int32, device),
            longest=max(sizes),
        )
