"""One sequence from submission to its last token, across as many workers as that takes."""

from typing import Protocol

import msgspec

from tandem_router.dispatch.stream import TokenStream
from tandem_router.errors import (
    ContextLengthExceeded,
    GenerationFailed,
    InvalidRequest,
    RouterError,
)
from tandem_router.workers.link import WorkerLink
from tandem_wire.messages import (
    PrefillPeer,
    Refused,
    SamplingParams,
    StepItem,
    Submit,
    TokenLogprobs,
    Welcome,
)

MAX_WORKER_ERRORS = 3
REFUSED_SECONDS = 0.25
MIN_TTFT_SECONDS = 0.001
"""An objective that is lost already still says that it is one."""


class Placer(Protocol):
    """The dispatcher, as a sequence sees it."""

    def place(self, sequence: "Sequence") -> None:
        """Find a (next) worker, now or as soon as there is one."""

    def finished(self, sequence: "Sequence") -> None:
        """The sequence is over, well or badly."""

    def on_failover(self, stage: str) -> None:
        """Count a re-submission: stage is "refused", "prefill", "decode", "moved" or "error"."""

    def on_first_token(self, sequence: "Sequence", now: float) -> None:
        """Measure TTFT."""

    def on_gap(self, sequence: "Sequence", seconds: float) -> None:
        """Measure one gap between tokens."""


class Sequence:
    """One prompt's one choice. Implements `workers.link.Attempt`.

    Every attempt has a rid of its own, so a late frame can't be taken for one of a newer attempt.
    The tokens streamed so far go along with the next attempt: the client sees only a pause.
    """

    __slots__ = (
        "_placer", "arrived_at", "attempt", "avoid", "cache_salt", "decode_worker", "done",
        "failovers", "gaps", "index", "kv_bytes", "last_token_at", "last_trouble",
        "link", "name", "num_cached_tokens", "num_errors", "origin", "output", "params",
        "prefill_worker", "priority", "prompt", "prompt_logprobs", "retry_after_seconds",
        "rid", "slo_class", "stream", "tbt_seconds", "ttft_seconds", "waiting_since",
        "was_accepted",
    )  # fmt: skip

    def __init__(
        self,
        placer: Placer,
        stream: TokenStream["Sequence"],
        *,
        name: str,
        index: int,
        prompt: list[int],
        params: SamplingParams,
        arrived_at: float,
        priority: int = 0,
        slo_class: str = "",
        ttft_seconds: float = 0.0,
        tbt_seconds: float = 0.0,
        cache_salt: str = "",
    ) -> None:
        """`name` is unique in this router; `index` is the choice's number in the answer.

        `ttft_seconds` and `tbt_seconds` are objectives, counted from `arrived_at`; 0: none.
        """
        self._placer = placer
        self.stream = stream
        self.name = name
        self.index = index
        self.prompt = prompt
        self.params = params
        self.arrived_at = arrived_at
        self.priority = priority
        self.slo_class = slo_class
        self.ttft_seconds = ttft_seconds
        self.tbt_seconds = tbt_seconds
        self.cache_salt = cache_salt
        self.output: list[int] = []
        self.prompt_logprobs: list[TokenLogprobs] = []  # of the prompt's second token and on
        self.link: WorkerLink | None = None
        self.origin: Welcome | None = None  # what the worker of the first tokens was
        self.rid = ""
        self.attempt = 0
        self.done = False
        self.was_accepted = False  # a worker has had it: it may wait longer for the next one
        self.waiting_since = arrived_at
        self.avoid: dict[str, float] = {}  # worker name -> until when it isn't asked again
        self.num_errors = 0
        self.failovers = 0
        self.last_trouble = ""
        self.retry_after_seconds = 0.0
        self.last_token_at = 0.0
        self.gaps: list[float] = []
        self.num_cached_tokens = 0
        self.decode_worker = ""
        self.prefill_worker = ""
        self.kv_bytes = 0

    def build_submit(self, prefill: list[PrefillPeer], now: float) -> Submit:
        """The next attempt's message, under a new rid."""
        self.attempt += 1
        self.rid = f"{self.name}.{self.attempt}"
        params = self.params
        if params.prompt_logprobs is not None:
            if self.output:
                params = msgspec.structs.replace(params, prompt_logprobs=None)
            else:
                self.prompt_logprobs.clear()
        return Submit(
            rid=self.rid,
            tokens=self.prompt + self.output,
            num_prompt_tokens=len(self.prompt),
            params=params,
            prefill=prefill,
            priority=self.priority,
            slo_class=self.slo_class,
            cache_salt=self.cache_salt,
            ttft_seconds=self._ttft_left(now),
            tbt_seconds=self.tbt_seconds,
        )

    def _ttft_left(self, now: float) -> float:
        """What is left of the objective for the first token; 0: there is none any more."""
        if self.output or not self.ttft_seconds:
            return 0.0
        return max(self.ttft_seconds - (now - self.arrived_at), MIN_TTFT_SECONDS)

    # --- called by the link -----------------------------------------------------------------------

    def on_item(self, item: StepItem, now: float) -> None:
        """Tokens of one step, or logprobs of the prompt."""
        if item.prompt_logprobs is not None:
            self.prompt_logprobs += item.prompt_logprobs
            if not item.tokens and not item.finish:
                return
        if item.tokens:
            if self.output:
                gap = now - self.last_token_at
                self.gaps.append(gap)
                self._placer.on_gap(self, gap)
            else:
                self.num_cached_tokens = item.num_cached_tokens
                self.prefill_worker = item.prefill_worker
                self.kv_bytes = item.kv_bytes
                assert self.link is not None, "items come only while an attempt runs"
                self.decode_worker = self.link.worker_id
                self._placer.on_first_token(self, now)
                if self._lacks_scores():
                    self._fail_unscored()
                    return
            self.last_token_at = now
            self.output += item.tokens
        if not item.finish:
            self.stream.push(self, item)
        elif item.finish in ("stop", "length"):
            self._end(item)
        else:
            self._continue_elsewhere(item, now)

    def _lacks_scores(self) -> bool:
        wanted = self.params.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) != len(self.prompt) - 1

    def _fail_unscored(self) -> None:
        """A worker of an older release ignores what it doesn't know."""
        assert self.link is not None, "items come only while an attempt runs"
        self.link.cancel(self.rid)
        self.fail(
            GenerationFailed(
                f"worker {self.decode_worker} reports no logprobs of prompts, because it is of"
                " another release: try again when the roll-out is over"
            )
        )

    def _continue_elsewhere(self, item: StepItem, now: float) -> None:
        """The worker gave up the sequence: moved, cancelled by itself, or failed."""
        if item.tokens:
            self.stream.push(self, StepItem(item.rid, item.tokens, logprobs=item.logprobs))
        assert self.link is not None, "items come only while an attempt runs"
        if item.finish == "error":
            self.num_errors += 1
            self.link.breaker.on_failure(now)
            self.last_trouble = (
                f"worker {self.link.worker_id} failed: {item.error or 'it gave no reason'}"
            )
            if self.num_errors >= MAX_WORKER_ERRORS:
                self.fail(GenerationFailed(self.last_trouble))
                return
        else:
            self.last_trouble = f"worker {self.link.worker_id} gave up the request"
        self.avoid[self.link.address.name] = now + REFUSED_SECONDS
        self._retry("error" if item.finish == "error" else "moved", now)

    def on_refused(self, refused: Refused, now: float) -> None:
        """The worker won't run it: the client is at fault, or another worker must try."""
        if refused.code == "too_long":
            # Its cache may hold less than the model's context: the worker's own words say which.
            assert self.link is not None, "refusals come only while an attempt runs"
            assert self.link.welcome is not None, "a worker that refuses has been welcomed"
            longest = self.link.welcome.max_model_len
            self.fail(ContextLengthExceeded.of(longest, f"The worker says: {refused.message}"))
            return
        if refused.code == "invalid":
            self.fail(InvalidRequest(refused.message))
            return
        assert self.link is not None, "refusals come only while an attempt runs"
        self.last_trouble = f"{refused.code}: {refused.message}"
        self.retry_after_seconds = max(self.retry_after_seconds, refused.retry_after_seconds)
        pause = max(refused.retry_after_seconds, REFUSED_SECONDS)
        self.avoid[self.link.address.name] = now + min(pause, 5.0)
        if refused.code in ("no_room", "draining"):
            self.link.breaker.on_abandoned()
        else:
            self.link.breaker.on_failure(now)
        self._retry("refused", now, was_accepted=self.was_accepted)

    def on_lost(self, reason: str, now: float) -> None:
        """The worker's connection is gone."""
        lost = f"lost worker {self.decode_worker}" if self.decode_worker else "lost the worker"
        self.last_trouble = f"{lost}: {reason}"
        self._retry("decode" if self.output else "prefill", now)

    def _retry(self, stage: str, now: float, *, was_accepted: bool = True) -> None:
        self.link = None
        self.was_accepted = was_accepted
        if stage != "refused":
            self.failovers += 1
        self.waiting_since = now if stage != "refused" else self.waiting_since
        self._placer.on_failover(stage)
        if len(self.output) >= self.params.max_tokens:
            # The last token arrived, but not the news that it was the last.
            self._end(StepItem(self.rid, [], finish="length"))
            return
        self._placer.place(self)

    # --- the end ----------------------------------------------------------------------------------

    def _end(self, item: StepItem) -> None:
        self.link = None
        self.done = True
        self.stream.push(self, item)
        self._placer.finished(self)

    def fail(self, error: RouterError) -> None:
        """End with an error instead of tokens."""
        if self.done:
            return
        self.link = None
        self.done = True
        self.stream.push(self, error)
        self._placer.finished(self)

    def cancel(self) -> None:
        """No further tokens are wanted: a stop string was hit, or the client left."""
        if self.done:
            return
        self.done = True
        if self.link is not None:
            self.link.cancel(self.rid)
            self.link = None
        self._placer.finished(self)
