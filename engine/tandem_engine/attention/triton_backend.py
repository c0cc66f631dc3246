"""Attention by the Triton kernels, and cuDNN where it is faster: the GPU's backend."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import torch

from tandem_engine.attention.backend import AttentionBackend, Chunk, HeadNorms, StepTensors
from tandem_engine.attention.torch_backend import rotate_and_store
from tandem_engine.models.spec import ModelSpec
from tandem_engine.upload import upload
from tandem_kernels.attention.decode_kernel import paged_decode
from tandem_kernels.attention.extend_kernel import paged_extend
from tandem_kernels.attention.split_plan import DecodePlan, make_decode_plan
from tandem_kernels.attention.torch_extend import extend_with_cudnn, suits
from tandem_kernels.overlap import is_supported

_MOST_CHUNKS: Final = 4
"""How many chunks of a prompt, from its start, go to cuDNN."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Chunks whose rows follow each other, for one launch."""

    rows: slice
    tables: torch.Tensor  # [C, M] int32
    starts: torch.Tensor  # [C] int32
    row_starts: torch.Tensor  # [C + 1] int32
    longest: int


class TritonAttention(AttentionBackend):
    """Decodes by split-KV over the step's own lengths; chunks by tiles of rows.

    A step's `decode_tables` and `decode_lengths` must be int32 views of long-lived buffers, the
    same for every step of one size: their plans are made once, and CUDA graphs keep them.

    cuDNN is the fastest for long chunks, but builds a plan for every shape it meets, which takes it
    about a second: so it only gets the chunks of a long prompt that has steps to itself.

    Args:
        kv_cache: [layers, 2, N, K, P, D].
        chunk_sizes: tokens of the chunks that such a prompt is cut into.
        max_length: of a prompt.
    """

    def __init__(
        self,
        spec: ModelSpec,
        kv_cache: torch.Tensor,
        chunk_sizes: Collection[int] = (),
        max_length: int = 0,
    ) -> None:
        self._spec = spec
        self._by_cudnn = {
            (size, number * size)
            for size in chunk_sizes
            for number in range(min(_MOST_CHUNKS, max_length // size))
        }
        self._caches = [(layer[0], layer[1]) for layer in kv_cache]
        self._windows = [layer.window for layer in spec.layers]
        self._programs = torch.cuda.get_device_properties(kv_cache.device).multi_processor_count
        self._overlap = is_supported()
        self._plans: dict[int, dict[int | None, DecodePlan]] = {}
        self._step: StepTensors | None = None
        self._decode: dict[int | None, DecodePlan] = {}
        self._runs: list[_Run] = []
        self._alone: list[tuple[Chunk, _Run]] = []

    def plan(self, step: StepTensors) -> None:
        self._step = step
        count = step.num_decodes
        if count:
            if count not in self._plans:
                self._plans[count] = self._make_plans(step)
            self._decode = self._plans[count]
            for plan in self._decode.values():
                plan.refill()
        self._runs, self._alone = [], []
        for alone, group in groupby(step.chunks, self._goes_alone):
            if alone:
                self._alone += [(chunk, _gather_run([chunk])) for chunk in group]
            else:
                self._runs.append(_gather_run(list(group)))

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
                programs=self._programs,
            )
            for window in set(self._windows)
        }

    def _goes_alone(self, chunk: Chunk) -> bool:
        """Whether some layer computes this chunk by itself, with cuDNN."""
        return any(self._suits_cudnn(chunk, window) for window in set(self._windows))

    def _suits_cudnn(self, chunk: Chunk, window: int | None) -> bool:
        shape, softcap = (chunk.num_tokens, chunk.start), self._spec.attention_softcap
        return shape in self._by_cudnn and suits(
            chunk.num_tokens, self._caches[0][0], chunk.start, window, softcap
        )

    def prepare(self) -> None:
        """Have cuDNN build its plans, once, before the first step."""
        spec, (keys, values) = self._spec, self._caches[0]
        page = keys.shape[2]
        for num_tokens, start in self._by_cudnn:
            table = torch.zeros(-(-(start + num_tokens) // page), dtype=torch.int64)
            chunk = Chunk(0, num_tokens, start, table.to(keys.device))
            if not self._goes_alone(chunk):
                continue
            qkv = torch.zeros((num_tokens, spec.qkv_size), dtype=keys.dtype, device=keys.device)
            query = qkv[:, : spec.num_heads * spec.head_dim].unflatten(1, (spec.num_heads, -1))
            self._extend_alone(chunk, query, keys, values)

    def store(
        self,
        layer: int,
        qkv: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        norms: HeadNorms | None,
    ) -> torch.Tensor:
        step = self._step
        assert step is not None, "plan() comes before store()"
        slots = (step.slot_blocks, step.slot_offsets)
        return rotate_and_store(self._spec, qkv, angles, norms, *self._caches[layer], *slots)

    def attend(
        self, layer: int, query: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        step, spec = self._step, self._spec
        assert step is not None, "plan() comes before attend()"
        keys, values = self._caches[layer]
        window = self._windows[layer]
        limits = (spec.attention_scale, window, spec.attention_softcap)
        if (
            out is None
            and len(step.chunks) == 1
            and not step.num_decodes
            and self._suits_cudnn(step.chunks[0], window)
        ):
            return self._extend_alone(step.chunks[0], query, keys, values).flatten(1)
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
        runs = list(self._runs)
        for chunk, run in self._alone:
            if self._suits_cudnn(chunk, window):
                self._extend_alone(chunk, query[run.rows], keys, values, rows[run.rows])
            else:
                runs.append(run)
        for run in runs:
            chunks = (run.tables, run.starts, run.row_starts, run.longest)
            paged_extend(query[run.rows], keys, values, *chunks, *limits, out=rows[run.rows])
        return out

    def _extend_alone(
        self,
        chunk: Chunk,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        pages = (keys, values, chunk.block_table, chunk.start)
        return extend_with_cudnn(query, *pages, self._spec.attention_scale, out)


def _gather_run(chunks: list[Chunk]) -> _Run:
    """One launch's metadata on the device."""
    device = chunks[0].block_table.device
    sizes = [chunk.num_tokens for chunk in chunks]
    first = chunks[0].row
    tables = torch.nn.utils.rnn.pad_sequence(
        [chunk.block_table for chunk in chunks], batch_first=True
    )
    row_starts = [0]
    for size in sizes:
        row_starts.append(row_starts[-1] + size)
    return _Run(
        rows=slice(first, first + row_starts[-1]),
        tables=tables.int(),
        starts=upload([chunk.start for chunk in chunks], torch.int32, device),
        row_starts=upload(row_starts, torch.int32, device),
        longest=max(sizes),
    )
