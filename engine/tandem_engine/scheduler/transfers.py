"""The hand-off as the scheduler sees it: fetches of the decode side, pushes of the prefill side."""

from collections.abc import Iterable

from tandem_engine import metrics
from tandem_engine.cache.prefix_index import PrefixMatch
from tandem_engine.handoff.events import (
    FetchCancelled,
    FetchDone,
    FetchFailed,
    FetchRequest,
    PushChunk,
    PushFailed,
)
from tandem_engine.metrics import Meter
from tandem_engine.scheduler.blocks import RequestBlocks
from tandem_engine.scheduler.limits import Limits
from tandem_engine.scheduler.outbox import Outbox
from tandem_engine.scheduler.request import Request, State
from tandem_engine.step import SampledTokens


class Transfers:
    """Requests whose blocks the hand-off works on.

    A fetching request's blocks are the hand-off's until `FetchDone` or `FetchFailed`, even if the
    request has ended meanwhile (ABANDONED). A remote prefill's blocks are pinned from its first
    push to `PushDone` or `PrefillDropped`.
    """

    def __init__(self, limits: Limits, blocks: RequestBlocks, outbox: Outbox, meter: Meter) -> None:
        self._limits = limits
        self._blocks = blocks
        self._outbox = outbox
        self._meter = meter
        self._fetching: dict[str, Request] = {}
        self._abandoned: dict[str, Request] = {}
        self._pushing: dict[str, Request] = {}

    @property
    def num_fetching(self) -> int:
        """Routed requests that wait for KV."""
        return len(self._fetching)

    @property
    def num_pushing(self) -> int:
        """Computed remote prefills whose pages are still pinned."""
        return len(self._pushing)

    @property
    def abandoned(self) -> Iterable[Request]:
        """Requests that have ended, but whose blocks the hand-off has not given back."""
        return self._abandoned.values()

    @property
    def num_open(self) -> int:
        """All requests whose blocks the hand-off holds or has pinned."""
        return len(self._fetching) + len(self._pushing) + len(self._abandoned)

    def is_open(self, key: str) -> bool:
        """Whether the hand-off still has an earlier request of this name."""
        return key in self._fetching or key in self._abandoned

    # --- D: fetching ------------------------------------------------------------------------------

    def wants_fetch(self, request: Request, match: PrefixMatch) -> bool:
        """Whether a prefill worker should compute what `match` (its full blocks) leaves over."""
        if not request.may_fetch:
            return False
        cached = len(match.blocks) * self._limits.page_size
        return len(request.tokens) - cached > self._limits.local_prefill_tokens

    def fetch(self, request: Request, now: float) -> None:
        """Lease the blocks of a placed request to the hand-off and have them filled."""
        fetch = request.fetch
        assert fetch is not None
        assert request.holding is not None
        request.state = State.FETCHING
        fetch.asked = True
        request.holding.leased = True
        request.prefill_start = now
        self._fetching[request.key] = request
        skip = request.num_computed
        self._outbox.handoff(
            FetchRequest(
                rid=request.key,
                tokens=tuple(request.tokens),
                num_prompt_tokens=request.num_prompt_tokens,
                num_skip_tokens=skip,
                blocks=tuple(request.blocks[skip // self._limits.page_size :]),
                params=request.params,
                peers=fetch.peers,
                priority=request.priority,
                cache_salt=fetch.cache_salt,
            )
        )

    def abandon(self, request: Request) -> None:
        """The request has ended; its blocks are freed once the hand-off has fenced them."""
        del self._fetching[request.key]
        self._abandoned[request.key] = request
        request.state = State.ABANDONED
        self._outbox.handoff(FetchCancelled(request.key))

    def finish_fetch(self, event: FetchDone | FetchFailed, now: float) -> Request | None:
        """Take the blocks back. None: no one is waiting for them, and they have been freed.

        After `FetchDone` the request can decode; after `FetchFailed` it is as it was placed.
        """
        abandoned = self._abandoned.pop(event.rid, None)
        if abandoned is not None:
            self._blocks.release(abandoned)
            abandoned.state = State.DONE
            return None
        request = self._fetching.pop(event.rid, None)
        if request is None:
            return None
        fetch = request.fetch
        assert fetch is not None
        assert request.holding is not None
        request.holding.leased = False
        if isinstance(event, FetchFailed):
            self._meter.count(metrics.TRANSFER_FAILURES)
            return request
        self._blocks.complete(request)
        fetch.worker_id, fetch.num_bytes = event.worker_id, event.num_bytes
        cached = max(request.num_cached_tokens, event.num_cached_tokens)
        request.num_cached_tokens = min(cached, request.num_prompt_tokens)
        self._meter.count(metrics.TRANSFERS)
        self._meter.count(metrics.TRANSFER_BYTES, event.num_bytes)
        self._meter.observe(metrics.TRANSFER_SECONDS, event.seconds)
        self._meter.observe(metrics.FETCH_SECONDS, now - request.prefill_start)
        return request

    # --- P: pushing -------------------------------------------------------------------------------

    def push_ready(self, request: Request) -> None:
        """Push every full page that is computed (or was cached) and hasn't been pushed."""
        assert request.push is not None
        page, start = self._limits.page_size, request.push.num_pushed
        end = min(request.num_computed, len(request.tokens) - 1) // page * page
        if end > start:
            self._outbox.handoff(PushChunk(request.key, start, end, self._take(request, end)))

    def push_last(self, request: Request, result: SampledTokens, now: float) -> None:
        """Push the rest with the first sampled token; the blocks stay pinned until `PushDone`."""
        assert request.push is not None
        start, end = request.push.num_pushed, len(request.tokens)
        seconds = now - request.prefill_start
        self._meter.observe(metrics.REMOTE_PREFILL_SECONDS, seconds)
        self._outbox.handoff(
            PushChunk(
                request.key,
                start,
                end,
                self._take(request, end),
                last=True,
                first_token=result.tokens[0],
                first_logprobs=result.logprobs[0] if result.logprobs else None,
                num_cached_tokens=request.num_cached_tokens,
                prefill_seconds=seconds,
            )
        )
        request.state = State.PUSHING
        self._pushing[request.key] = request

    def _take(self, request: Request, end: int) -> tuple[int, ...]:
        """The blocks of the tokens up to `end` that haven't been pushed; they are from now on."""
        assert request.push is not None
        assert request.holding is not None
        page, start = self._limits.page_size, request.push.num_pushed
        request.holding.leased = True
        request.push.num_pushed = end
        return tuple(request.blocks[start // page : -(-end // page)])

    def refuse(self, key: str, code: str, message: str) -> None:
        """Tell the decode worker that its prompt will not be computed here."""
        self._meter.count(metrics.PREFILLS_REFUSED)
        self._outbox.handoff(PushFailed(key, code, message))

    def forget(self, request: Request) -> None:
        """The hand-off no longer needs a pushed request's pages."""
        del self._pushing[request.key]
