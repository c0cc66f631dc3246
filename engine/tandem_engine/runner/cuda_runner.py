"""The GPU's runner: decode steps are CUDA graphs, and sampled tokens stay on the device."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from tandem_engine.attention.latent_triton import TritonLatentAttention
from tandem_engine.attention.triton_backend import TritonAttention
from tandem_engine.device import upload
from tandem_engine.models.collective import ALONE, Collective
from tandem_engine.models.decoder import Decoder
from tandem_engine.runner.decode_graphs import DecodeGraphs, padded_sizes
from tandem_engine.runner.decode_slots import DecodeSlots
from tandem_engine.runner.device_kv import DeviceKVStore
from tandem_engine.runner.piece_graphs import ROW_TILE, CudaRecorder, PieceGraphs
from tandem_engine.runner.prompt_slots import PromptSlots
from tandem_engine.runner.step_input import Split, add_chunks, last_rows_of, split_batch
from tandem_engine.sampling.prompt_scores import PromptScores, flat_rows, score_prompts
from tandem_engine.sampling.sampler import Choice, Sampler
from tandem_engine.spec.model import ModelSpec
from tandem_engine.step import (
    Batch,
    BatchItem,
    PendingStep,
    Runner,
    SampledTokens,
    ScoredRows,
    StepShapes,
)
from tandem_kernels.compilation import collect_kernels, compile_all
from tandem_kernels.sampling import argmax

log = logging.getLogger(__name__)

_END_SIZES: Final = (1, 8, 64)
"""The rows of a step with prompts whose logits are wanted are padded to these, or to the most."""


@dataclass(frozen=True, slots=True)
class _LaunchedStep(PendingStep):
    """A step whose results are on their way to the host."""

    items: list[BatchItem]
    rows: list[int]  # places in `items` of the rows in `choice`
    choice: Choice | None
    done: torch.cuda.Event
    scores: PromptScores | None = None
    scored: list[ScoredRows] = field(default_factory=list)

    def wait(self) -> list[SampledTokens | None]:
        self.done.synchronize()
        results: list[SampledTokens | None] = [None] * len(self.items)
        if self.choice is not None:
            tokens = self.choice.read([self.items[row] for row in self.rows])
            for row, token in zip(self.rows, tokens, strict=True):
                if self.items[row].sample:
                    results[row] = token
        if self.scores is not None:
            self.scores.put_into(results, Batch(self.items, scored=self.scored))
        return results


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaOptions:
    """How a runner runs its model.

    Args:
        eos_token_ids: they end a generation.
        max_model_len: tokens of the longest sequence.
        max_running: most sequences that decode at once.
        prompt_rows: tokens of the largest step with prompts that is made of CUDA graphs.
        graphs: whether decode steps are CUDA graphs, and the steps that `prompt_rows` allows.
    """

    eos_token_ids: tuple[int, ...]
    max_model_len: int
    max_running: int
    prompt_rows: int = 0
    graphs: bool = True


class CudaRunner(Runner):
    """Runs a decoder over paged KV on one GPU.

    Args:
        parameters: by the names of `models/parameters.py`, on the device; never written to.
        kv: owned by the runner from here on.
        collective: owned by the runner too. Every rank is given the same batches; the first one
            samples, and the others have no results.
    """

    kv: DeviceKVStore
    plans_ahead = True

    def __init__(
        self,
        spec: ModelSpec,
        parameters: dict[str, torch.Tensor],
        kv: DeviceKVStore,
        options: CudaOptions,
        collective: Collective = ALONE,
    ) -> None:
        max_running, graphs = options.max_running, options.graphs
        self.spec = spec
        self.vocab_size = spec.vocab_size
        self.eos_token_ids = options.eos_token_ids
        self.max_model_len = options.max_model_len
        self.max_running = max_running
        self.num_blocks = kv.cache.shape[2]
        self.kv = kv
        self._page = kv.layout.page_size
        self._device = kv.cache.device
        self._collective = collective
        self._model = Decoder(spec, parameters, collective)
        self._attention: TritonAttention | TritonLatentAttention
        if spec.latent is None:
            self._attention = TritonAttention(spec, kv.cache)
        else:
            self._attention = TritonLatentAttention(spec, kv.cache)
        self._sampler = Sampler(self.eos_token_ids)
        max_blocks = -(-self.max_model_len // self._page)
        self._slots = DecodeSlots(max_running, max_blocks, self._page, self._device)
        self._logits = torch.empty(
            (max_running, spec.vocab_size), dtype=torch.float32, device=self._device
        )
        pool = torch.cuda.graph_pool_handle()
        sizes = padded_sizes(max_running)
        self._graphs = DecodeGraphs(self._decode, sizes, pool, enabled=graphs)
        self._prompts = PromptSlots(options.prompt_rows, max_running, self._page, self._device)
        recorder = CudaRecorder(pool)
        self._pieces = PieceGraphs(self._model, self._attention, options.prompt_rows, recorder)
        ends = [size for size in _END_SIZES if size < max_running] + [max_running]
        self._ends = DecodeGraphs(self._end, ends, pool, enabled=graphs)
        self._captures = graphs
        self.shapes = StepShapes(tuple(sizes), tuple(self._pieces.sizes), ROW_TILE)

    @property
    def prompt_sizes(self) -> list[int]:
        """The numbers of tokens that steps with prompts are padded to."""
        return self._pieces.sizes

    @property
    def num_graphs(self) -> int:
        """Number of graphs, each as large as a whole step's, once all are captured."""
        return len(self._graphs.sizes) + len(self._pieces.sizes)

    def compile_steps(self, batches: Sequence[Batch]) -> None:
        """Compile, in parallel, the kernels of these batches and of any number of decodes.

        The runner must have no graphs. No batch may ask for logprobs: tokens aren't computed.
        """
        assert not self._captures, "graphs would lack the kernels"
        whole, self._model = self._model, self._model.abridged()
        try:
            with torch.inference_mode(), collect_kernels() as kernels:
                for batch in batches:
                    self.launch(batch)
                self._slots.stage([])
                for size in self._graphs.sizes:
                    self._decode(size)
        finally:
            self._model = whole
        num_threads = torch.get_num_threads()
        log.info("compiling %d kernels, %d at a time", len(kernels), num_threads)
        compile_all(kernels, num_threads)

    def capture_graphs(self, progress: Callable[[float], None]) -> None:
        """Capture the graphs of decode steps of every size now, not when they are first needed."""
        with torch.inference_mode():
            self._slots.stage([])
            self._graphs.capture_all(progress)

    def capture_pieces(self) -> None:
        """Capture the graphs of steps with prompts of every size now."""
        if not self._captures:
            return
        with torch.inference_mode():
            # Larger ones first: the smaller ones reuse their memory.
            for size in reversed(self._pieces.sizes):
                self._pieces.run(self._prompts.fill(self._slots, 0, [], size), 0)
            if self._pieces.sizes:
                self._ends.capture_all(lambda _: None)

    def _decode(self, size: int) -> None:
        """A decode step of `size` rows: staged inputs → logits and the most likely tokens."""
        hidden = self._model.forward(self._slots.fill(size), self._attention)
        logits = self._model.logits(hidden, out=self._logits[:size])
        argmax(logits, out=self._slots.sampled[:size])

    def _end(self, size: int) -> None:
        """End a step in pieces, for `size` of its rows: logits and the most likely tokens."""
        pieces, rows = self._pieces, self._prompts.wanted[:size]
        hidden = self._model.leave(pieces.attn_output, pieces.residual, rows)
        logits = self._model.logits(hidden, out=self._logits[:size])
        argmax(logits, out=self._slots.sampled[:size])

    def time_decode_graph(self, count: int, repeats: int = 20) -> float:
        """Seconds per step when the GPU repeats the last step of `count` decodes."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        size = self._graphs.size_for(count)
        with torch.inference_mode():
            begin.record()
            for _ in range(repeats):
                self._graphs.replay(size)
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / repeats

    def execute(self, batch: Batch) -> list[SampledTokens | None]:
        return self.launch(batch).wait()

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingStep:
        for source, destination in batch.copies:
            self.kv.copy_block(source, destination)
        items = batch.items
        # Prompts with one token left count as decodes, and nothing bounds their number.
        split = split_batch(items, self._slots.max_rows)
        choice, scores = None, None
        if batch.scored:
            rows = [index for index, item in enumerate(items) if item.sample]
            choice, scores = self._run_scored(batch, split, rows)
        elif items and not split.chunks:
            rows = split.decodes
            choice = self._run_decodes(items)
        elif items:
            rows = [index for index, item in enumerate(items) if item.sample]
            choice = self._run_mixed(items, split, rows)
        else:
            rows = []
        host = None if choice is None else choice.to_host()
        done = torch.cuda.Event()
        found = None if scores is None else scores.to_host()
        done.record()
        self.kv.steps_until(done)
        return _LaunchedStep(items, rows, host, done, found, batch.scored)

    def _run_decodes(self, items: list[BatchItem]) -> Choice | None:
        self._slots.stage(items)
        self._graphs.replay(self._graphs.size_for(len(items)))
        count = len(items)
        choice, tokens = None, self._slots.sampled[:count]
        if self._collective.is_first:
            choice = self._sampler.choose(self._logits[:count], items, tokens)
        self._collective.share(tokens)
        return choice

    def _run_scored(
        self, batch: Batch, split: Split, sampled: list[int]
    ) -> tuple[Choice | None, PromptScores | None]:
        """A step of which prompt tokens get logprobs, without graphs."""
        items = batch.items
        self._slots.stage([items[index] for index in split.decodes])
        size = self._graphs.size_for(len(split.decodes)) if split.decodes else 0
        chunks = [items[index] for index in split.chunks]
        place = {index: row for row, index in enumerate(split.decodes)}
        place.update(zip(split.chunks, last_rows_of(chunks, size), strict=True))
        last_rows = [place[index] for index in range(len(items))]
        wanted = [last_rows[index] for index in sampled]
        hidden = self._run_layers(size, chunks, wanted + flat_rows(batch, last_rows))
        logits = self._model.logits(hidden[: len(sampled)]) if sampled else hidden
        is_first, rest = self._collective.is_first, hidden[len(sampled) :]
        scores = score_prompts(self._model.logits, rest, batch, is_first=is_first)
        if not sampled or not is_first:
            return None, scores
        return self._sampler.choose(logits, [items[index] for index in sampled]), scores

    def _run_mixed(self, items: list[BatchItem], split: Split, sampled: list[int]) -> Choice | None:
        """A step with prompt chunks and perhaps decodes: in graphs of pieces if they fit."""
        self._slots.stage([items[index] for index in split.decodes])
        size = self._graphs.size_for(len(split.decodes)) if split.decodes else 0
        chunks = [items[index] for index in split.chunks]
        ends = last_rows_of(chunks, size)
        place = {index: row for row, index in enumerate(split.decodes)}
        place.update(zip(split.chunks, ends, strict=True))
        wanted = [place[index] for index in sampled]
        count = ends[-1] + 1
        padded = self._pieces.size_for(count)
        if padded is None or not self._captures or len(wanted) > self._slots.max_rows:
            logits, tokens = self._run_whole(size, chunks, wanted), None
        else:
            step = self._prompts.fill(self._slots, size, chunks, padded, wanted)
            self._pieces.run(step, count)
            logits, tokens = self._logits[: len(wanted)], self._slots.sampled[: len(wanted)]
            if wanted:
                self._ends.replay(self._ends.size_for(len(wanted)))
        if not wanted or not self._collective.is_first:
            return None
        return self._sampler.choose(logits, [items[index] for index in sampled], tokens)

    def _run_whole(self, size: int, chunks: list[BatchItem], wanted: list[int]) -> torch.Tensor:
        """A step of `size` decodes and these chunks without graphs → logits of the wanted rows."""
        hidden = self._run_layers(size, chunks, wanted)
        return self._model.logits(hidden) if wanted else hidden

    def _run_layers(self, size: int, chunks: list[BatchItem], wanted: list[int]) -> torch.Tensor:
        """The layers of a step of `size` decodes and these chunks → hidden of the wanted rows."""
        step = add_chunks(self._slots.fill(size), chunks, self._page)
        rows = upload(wanted, torch.int64, self._device)
        return self._model.forward(step, self._attention, rows)

    def close(self) -> None:
        torch.cuda.synchronize()
        # The graphs use communicators, so they must go first.
        self._clear_graphs()
        self._collective.close()

    def abandon(self) -> None:
        self._collective.abort(self._clear_graphs)

    def _clear_graphs(self) -> None:
        self._graphs.clear()
        self._pieces.clear()
        self._ends.clear()
