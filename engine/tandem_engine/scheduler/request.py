"""One request inside the core, from its arrival to its one end."""

from enum import Enum, auto
from typing import Final

from tandem_engine.cache.ledger import Holding
from tandem_engine.step import BatchItem
from tandem_wire.messages import PrefillPeer, SamplingParams

_UNKNOWN: Final = (0,)
"""In place of a token that only the device knows."""


class Kind(Enum):
    """Whom a request belongs to."""

    ROUTED = auto()  # a router's: tokens are streamed back
    REMOTE = auto()  # a decode worker's: the prompt's KV and one token are pushed


class State(Enum):
    """Where a request is. WAITING → (FETCHING →) PREFILL → DECODE or PUSHING → DONE."""

    WAITING = auto()  # holds no blocks
    FETCHING = auto()  # its blocks are leased to the hand-off
    PREFILL = auto()
    DECODE = auto()
    PUSHING = auto()  # computed; its blocks are pinned until the hand-off has pushed them
    ABANDONED = auto()  # has had its end; only the hand-off's answer keeps its blocks
    DONE = auto()


class Request:
    """A sequence of tokens and what is known about it.

    Invariants: KV exists in `holding` for the first `num_computed` tokens; `hashes` holds the
    chained hash of every full block of `tokens`; the first `num_registered` blocks are in the
    prefix index. `output` is tokens[num_prompt_tokens:].
    """

    __slots__ = (
        "arrival",
        "arrival_time",
        "cache_salt",
        "deadline",
        "decode_items",
        "end_length",
        "first_token_sent",
        "hashes",
        "holding",
        "key",
        "kind",
        "kv_bytes",
        "may_fetch",
        "num_cached_tokens",
        "num_computed",
        "num_preemptions",
        "num_prompt_tokens",
        "num_pushed",
        "num_registered",
        "output",
        "params",
        "peers",
        "prefill_start",
        "prefill_worker",
        "priority",
        "prompt",
        "router",
        "salt",
        "sort_key",
        "state",
        "stops",
        "tokens",
    )

    def __init__(
        self,
        key: str,
        kind: Kind,
        *,
        tokens: list[int],
        num_prompt_tokens: int,
        params: SamplingParams,
        salt: int,
        arrival: int,
        arrival_time: float,
        priority: int = 0,
        router: int = -1,
        peers: tuple[PrefillPeer, ...] = (),
        cache_salt: str = "",
        deadline: float = 0.0,
    ) -> None:
        self.key = key  # rid, or the hand-off's key of a remote prefill
        self.kind = kind
        self.state = State.WAITING
        self.tokens = tokens
        self.num_prompt_tokens = num_prompt_tokens
        self.prompt = tokens[:num_prompt_tokens]
        self.output = tokens[num_prompt_tokens:]
        self.params = params
        self.salt = salt
        self.cache_salt = cache_salt
        self.arrival = arrival
        self.arrival_time = arrival_time
        self.priority = priority
        self.router = router
        self.peers = peers
        self.deadline = deadline  # clock time until which a first token must have come; 0: none
        self.hashes: list[int] = []
        self.holding: Holding | None = None
        self.num_computed = 0
        self.num_registered = 0
        self.num_pushed = 0  # remote: tokens whose pages were handed to the hand-off
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.may_fetch = bool(peers)
        self.prefill_worker = ""
        self.kv_bytes = 0
        self.prefill_start = 0.0  # clock time; of a fetch, when it was asked for
        self.first_token_sent = False
        self.end_length = 0  # tokens (prompt and output) at which the request ends by length
        self.stops: frozenset[int] = frozenset()
        self.decode_items: list[BatchItem] = []
        self.sort_key: tuple[int, int, int] = (-priority, 0, arrival)

    @property
    def blocks(self) -> list[int]:
        """The block table; empty while the request holds nothing."""
        return self.holding.blocks if self.holding is not None else []

    def item(self, count: int) -> BatchItem:
        """A step's part of this sequence: the next `count` tokens."""
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
        if len(self.decode_items) < 2:
            item = self.item(1)
            item.sample = True
            self.decode_items.append(item)
        else:
            self.decode_items.reverse()
        return self.decode_items[-1]

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is still missing."""
        return len(self.tokens) - self.num_computed

    def append(self, token: int) -> None:
        """Add a generated token."""
        self.tokens.append(token)
        self.output.append(token)
