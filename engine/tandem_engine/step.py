"""The line between the torch-free half of a worker (scheduler, cache, hand-off) and its tensors."""

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tandem_engine.errors import StagingUnavailableError
from tandem_engine.memory import MemoryRegion, OpenCache, OwnStaging, PeerCache, Staging
from tandem_wire.handoff import KVLayout
from tandem_wire.messages import SamplingParams, TokenLogprobs


def has_penalties(params: SamplingParams) -> bool:
    """Whether sampling needs the tokens generated so far, not only their number."""
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


@dataclass(slots=True)
class BatchItem:
    """The part of one sequence that runs in this step.

    `tokens` are the ids at positions [start, start + len(tokens)): a prompt chunk, or one token of
    a decode. KV for positions < start is already in the pages of `block_table`; this step writes
    the rest. When `sample` is set, the runner returns what follows the last position.
    `output_tokens` are the sequence's generated tokens so far (for penalties and min_tokens).

    With `previous` >= 0 the item is planned ahead: its one token is what that row of the step
    before samples, which the host doesn't know yet; `tokens` holds a placeholder.
    """

    rid: str
    tokens: Sequence[int]
    start: int
    block_table: Sequence[int]
    sample: bool
    params: SamplingParams
    prompt_tokens: Sequence[int] = ()
    output_tokens: Sequence[int] = ()
    previous: int = -1

    @property
    def output_position(self) -> int:
        """The place in the output of the token that this step samples; 0 for the first."""
        return len(self.output_tokens) + (self.previous >= 0)

    @property
    def end(self) -> int:
        """Number of positions whose KV exists after this step."""
        return self.start + len(self.tokens)


class ScoredRows(NamedTuple):
    """The tokens [first, end) of the batch's item `item`, by their places in it."""

    item: int
    first: int
    end: int


@dataclass(slots=True)
class Batch:
    """One engine step: prompt chunks and decodes mixed, in the order of the results."""

    items: list[BatchItem]
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Block copies (source, destination) to make before anything else (copy-on-write)."""
    scored: list[ScoredRows] = field(default_factory=list)
    """The tokens whose successors in the prompt get logprobs."""


@dataclass(slots=True)
class SampledTokens:
    """What a step gave one item: one token, or as many as the runner could be sure of.

    `tokens` follow the item's last position, in order, at least one and at most `step_tokens` of
    the runner; none where `sample` was not set. The step has written the KV of all of them but the
    last, so there are never more than the item's block table has room for. The scheduler keeps them
    up to the sequence's end.
    `logprobs`, one for each token, are there when the item's parameters ask for them.
    `prompt_logprobs` are those of the prompt's tokens that follow the item's `scored` ones.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True, slots=True)
class StepShapes:
    """The sizes to which a runner pads steps with prompts, because it has prepared them.

    Args:
        decode_rows: numbers of decodes, ascending; empty: any number is as good.
        step_rows: rows of whole steps, decodes and prompt tokens, ascending; empty: likewise.
        tile: longer steps are computed in pieces of this many rows.
    """

    decode_rows: tuple[int, ...] = ()
    step_rows: tuple[int, ...] = ()
    tile: int = 1

    def pad_decodes(self, count: int) -> int:
        """Rows that so many decodes take of a step with prompts."""
        place = bisect_left(self.decode_rows, count)
        padded = self.decode_rows[place] if place < len(self.decode_rows) else count
        return padded if count else 0

    def fit(self, rows: int) -> int:
        """The most rows, up to so many, that leave nothing to pad; fewer than the least: as is."""
        sizes = self.step_rows
        if sizes and rows <= sizes[-1]:
            place = bisect_right(sizes, rows)
            return sizes[place - 1] if place else rows
        return rows // self.tile * self.tile


ANY_SHAPE: Final = StepShapes()


class PendingStep(ABC):
    """A step that was launched."""

    @abstractmethod
    def wait(self) -> list[SampledTokens | None]:
        """Its results once it has run: one entry per item, None where nothing was wanted."""


@dataclass(frozen=True, slots=True)
class FinishedStep(PendingStep):
    """A step that ran before `launch` returned."""

    results: list[SampledTokens | None]

    def wait(self) -> list[SampledTokens | None]:
        return self.results


class KVStore(ABC):
    """KV pages as the hand-off sees them: packed bytes, no tensors.

    Owned by the runner. The hand-off thread calls it while the core thread runs steps, so an
    implementation must allow that for different blocks; who may touch which block is decided by
    the block ledger: a block under export is pinned (its content is final), a block under import is
    reserved for one request and read by nobody until the commit.
    """

    layout: KVLayout
    write_bytes: int = 1 << 20
    """A good size of one export or import: on a CPU, what stays in the processor's cache."""

    @abstractmethod
    def export_blocks(self, blocks: Sequence[int], layers: range) -> bytes | memoryview:
        """Packed bytes [layer, K/V, page, head, token, dim] of `blocks` for a range of layers."""

    def export_into(self, blocks: Sequence[int], layers: range, out: memoryview) -> None:
        """Pack `blocks` into `out`, which has exactly the room; override it to save a copy."""
        out[:] = self.export_blocks(blocks, layers)

    def views(self, blocks: Sequence[int], layers: range) -> list[memoryview] | None:
        """The packed bytes of `blocks` where they lie, piece by piece, to be read or written there.

        None: they are not in the host's memory, or in pieces so small that packing them is faster.
        """
        return None

    @abstractmethod
    def import_blocks(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        """Write packed bytes into `blocks`. Raises ValueError when their length is wrong."""

    def reserve(self, blocks: Sequence[int]) -> None:
        """Learn that `blocks` will be imported, and that no step launched from now on uses them."""
        return None

    def settle(self, blocks: Sequence[int]) -> None:
        """Learn that no step uses `blocks` any more: they may be imported without waiting."""
        return None

    def regions(self) -> tuple[MemoryRegion, ...]:
        """The memory of the whole cache, for a transport that registers it; empty: it can't be."""
        return ()

    @property
    def is_on_host(self) -> bool:
        """Whether the cache is in this process's own memory, where a processor copies pages."""
        return any(region.kind == "host" for region in self.regions())

    def make_staging(self, num_bytes: int) -> Staging:
        """Make memory that another process can map, on the device that has the cache.

        Raises StagingUnavailableError.
        """
        raise StagingUnavailableError("this worker's KV cache is not in the memory of one GPU")

    def map_staging(self, descriptor: int, num_bytes: int) -> Staging:
        """Map what another process has made; the descriptor stays the caller's.

        Raises StagingUnavailableError.
        """
        raise StagingUnavailableError("this worker's KV cache is not in the memory of one GPU")

    def make_own_staging(self, num_bytes: int) -> OwnStaging:
        """Make memory on the device that has the cache, for a library that reads or writes it.

        Raises StagingUnavailableError.
        """
        raise StagingUnavailableError("this worker's KV cache is not in the memory of one GPU")

    def open_cache(self) -> OpenCache:
        """Make the cache one that other processes write to. Raises StagingUnavailableError."""
        raise StagingUnavailableError("this worker's KV cache is not in the memory of one GPU")

    def map_cache(self, descriptors: Sequence[int], details: Mapping[str, str | int]) -> PeerCache:
        """Map what another process has opened; the descriptors stay the caller's.

        Args:
            details: what the other side's `OpenCache.details` says.

        Raises StagingUnavailableError.
        """
        raise StagingUnavailableError("this worker's KV cache is not in the memory of one GPU")

    def is_settled(self, blocks: Collection[int]) -> bool:
        """Whether no step that was launched before `reserve` can still write to `blocks`."""
        return True

    def pin(self, buffer: memoryview) -> Callable[[], None]:
        """Learn of memory through which many pages will go; call the result before it goes away."""
        return _nothing


def _nothing() -> None:
    """Undo a pin that did nothing."""


class Runner(ABC):
    """Owns the weights, the KV tensors and the sampler of one worker.

    The core calls `launch` from one thread only. Block numbers run from 0 to `num_blocks` - 1;
    the runner never decides which block belongs to whom.
    """

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    num_blocks: int
    kv: KVStore
    step_tokens: int = 1
    """The most tokens that one step gives a sequence. A decode's block table has room for that
    many. With more than one, no step is planned ahead."""
    plans_ahead: bool = False
    """Whether `launch` returns before the step has run, and takes items with `previous`."""
    shapes: StepShapes = ANY_SHAPE
    """What steps with prompts are padded to."""

    @abstractmethod
    def execute(self, batch: Batch) -> list[SampledTokens | None]:
        """Run one step; one entry per item, None where nothing was wanted of it."""

    def launch(self, batch: Batch) -> PendingStep:
        """Start one step. At most one other may be pending, and steps end in their order."""
        return FinishedStep(self.execute(batch))

    @abstractmethod
    def close(self) -> None:
        """Free what the runner holds; called once, after the last step."""

    def abandon(self) -> None:
        """Close when a rank of the model is gone: wait for no step and no rank."""
        self.close()
