"""One request inside the core, from its arrival to its end."""

from enum import Enum, auto
from typing import Final, Literal

from tandem_engine.cache.ledger import Holding
from tandem_engine.step import BatchItem, ScoredRows
from tandem_wire.messages import FinishReason, PrefillPeer, SamplingParams

Finish = FinishReason | Literal[""]
"""Why a request has ended; empty: it goes on."""

_UNKNOWN: Final = (0,)
"""In place of a token that only the device knows."""


class Kind(Enum):
    """Whose request it is."""

    ROUTED = auto()  # a router's: tokens are streamed back
    REMOTE = auto()  # a decode worker's: the prompt's KV and one token are pushed


class State(Enum):
    """Where a request is. WAITING → (FETCHING →) PREFILL → DECODE or PUSHING → DONE."""

    WAITING = auto()  # holds no blocks
    FETCHING = auto()  # its blocks are leased to the hand-off
    PREFILL = auto()
    DECODE = auto()
    PUSHING = auto()  # computed; its blocks are pinned until the hand-off has pushed them
    ABANDONED = auto()  # has ended; only the hand-off's answer keeps its blocks
    DONE = auto()


class Fetch:
    """Where a routed request may have its prompt computed, and what came of it (D's side).

    A prefill worker is asked at most once: after a failure or a preemption this worker prefills.
    """

    __slots__ = ("asked", "cache_salt", "num_bytes", "peers", "worker_id")

    def __init__(self, peers: tuple[PrefillPeer, ...], cache_salt: str) -> None:
        self.peers = peers
        self.cache_salt = cache_salt
        self.asked = False
        self.worker_id = ""  # the prefill worker that computed the prompt
        self.num_bytes = 0  # of KV that it sent


class Push:
    """How far a remote prefill has come on its way to the decode worker (P's side)."""

    __slots__ = ("num_pushed",)

    def __init__(self, num_skip_tokens: int) -> None:
        self.num_pushed = num_skip_tokens  # tokens whose pages the hand-off has or D has


class Request:
    """A sequence of tokens and what is known about it.

    Invariants: `blocks` is the list of `holding`, and empty while there is none; KV exists there
    for the first `num_computed` tokens; `hashes` holds the chained hash of every full block of
    `tokens`; the first `num_registered` blocks are in the prefix index. `output` is
    tokens[num_prompt_tokens:]. A REMOTE request has a `push` and no `fetch`; a ROUTED one has no
    `push`, and a `fetch` if it came with prefill workers.
    """

    __slots__ = (
        "arrival",
        "arrival_time",
        "blocks",
        "deadline",
        "decode_item",
        "end_length",
        "fetch",
        "first_token_sent",
        "first_whole",
        "hashes",
        "holding",
        "is_late",
        "key",
        "kind",
        "num_cached_tokens",
        "num_computed",
        "num_long_gaps",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered",
        "num_scored",
        "output",
        "params",
        "prefill_start",
        "priority",
        "prompt",
        "push",
        "router",
        "salt",
        "sort_key",
        "spare_item",
        "state",
        "stops",
        "tbt_seconds",
        "tokens",
        "ttft_due",
    )

    def __init__(
        self,
        key: str,
        *,
        tokens: list[int],
        num_prompt_tokens: int,
        params: SamplingParams,
        salt: int,
        arrival: int,
        arrival_time: float,
        priority: int = 0,
        router: int = -1,
        deadline: float = 0.0,
        ttft_due: float = 0.0,
        tbt_seconds: float = 0.0,
        fetch: Fetch | None = None,
        push: Push | None = None,
    ) -> None:
        self.key = key  # rid, or the hand-off's key of a remote prefill
        self.kind = Kind.ROUTED if push is None else Kind.REMOTE
        self.state = State.WAITING
        self.tokens = tokens
        self.num_prompt_tokens = num_prompt_tokens
        self.prompt = tokens[:num_prompt_tokens]
        self.output = tokens[num_prompt_tokens:]
        self.params = params
        self.salt = salt
        self.arrival = arrival
        self.arrival_time = arrival_time
        self.priority = priority
        self.router = router
        self.deadline = deadline  # clock time by which the first token must have come; 0: none
        self.ttft_due = ttft_due  # clock time of the first token's objective; 0: none
        self.tbt_seconds = tbt_seconds  # objective for its gaps; 0: none
        self.fetch = fetch
        self.push = push
        self.hashes: list[int] = []
        self.holding: Holding | None = None
        self.blocks: list[int] = []  # the block table
        self.num_computed = 0
        self.num_registered = 0
        self.first_whole = 0  # earlier blocks came without the layers that have a window
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_long_gaps = 0  # gaps longer than `tbt_seconds` that were counted
        self.is_late = False  # whether it lets others go first, because its TTFT is lost
        # Tokens of the prompt that need no logprobs any more; the first one has none.
        is_scored = params.prompt_logprobs is not None and push is None
        self.num_scored = 1 if is_scored else num_prompt_tokens
        self.prefill_start = 0.0  # clock time; of a fetch, when it was asked for
        self.first_token_sent = False
        self.end_length = 0  # tokens (prompt and output) at which the request ends by length
        self.stops: frozenset[int] = frozenset()
        self.decode_item: BatchItem | None = None  # of the last step that was planned
        self.spare_item: BatchItem | None = None  # of the one before
        self.sort_key: tuple[int, int, float, int] = (-priority, 0, arrival_time, arrival)

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is still missing."""
        return len(self.tokens) - self.num_computed

    @property
    def wants_scores(self) -> bool:
        """Whether logprobs of the prompt are wanted that weren't reported yet."""
        return self.num_scored < self.num_prompt_tokens

    def scored_rows(self, place: int, item: BatchItem) -> ScoredRows:
        """The tokens of its part of a step, at `place` in the batch, whose successors are scored.

        After a preemption they are fewer, because each successor is reported once.
        """
        first = max(self.num_scored - 1 - item.start, 0)
        end = min(item.end, self.num_prompt_tokens - 1) - item.start
        return ScoredRows(place, first, max(first, end))

    @property
    def may_fetch(self) -> bool:
        """Whether a prefill worker may still be asked to compute the prompt."""
        return self.fetch is not None and not self.fetch.asked

    def item(self, count: int) -> BatchItem:
        """This sequence's part of a step: the next `count` tokens."""
        start = self.num_computed
        return BatchItem(
            rid=self.key,
            tokens=self.tokens[start : start + count],
            start=start,
            block_table=self.blocks,
            sample=False,
            params=self.params,
            prompt_tokens=self.prompt,
            output_tokens=self.output,
        )

    def item_decode(self) -> BatchItem:
        """The last token, whose KV is all that is missing."""
        item = self._next_decode_item()
        item.tokens, item.start, item.previous = (self.tokens[-1],), self.num_computed, -1
        return item

    def item_ahead(self, row: int) -> BatchItem:
        """The token after that: the one that `row` of the step that runs now will sample."""
        item = self._next_decode_item()
        item.tokens, item.start, item.previous = _UNKNOWN, self.num_computed + 1, row
        return item

    def _next_decode_item(self) -> BatchItem:
        """Two items take turns: one may be in a step that runs."""
        item = self.spare_item
        if item is None:
            item = self.item(1)
            item.sample = True
        self.spare_item, self.decode_item = self.decode_item, item
        return item

    def extend(self, tokens: list[int]) -> Finish:
        """Add generated tokens, up to the one that ends the request; why it ends, if it does."""
        for token in tokens:
            self.tokens.append(token)
            self.output.append(token)
            if token in self.stops and len(self.output) > self.params.min_tokens:
                return "stop"
            if len(self.tokens) >= self.end_length:
                return "length"
        return ""
