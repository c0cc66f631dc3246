"""The step budget: how many prompt tokens a step may take while sequences decode beside them.

A step with a prompt chunk is a gap in every stream that decodes. Where these have an objective for
their gaps (TBT), chunks are cut so that the step keeps the strictest one, by the step times learned
so far. Where prompts would miss their objective for the first token (TTFT) by that and would keep
it with whole chunks, the gaps that an objective of a percentile leaves are spent on them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Final

from tandem_engine import metrics
from tandem_engine.metrics import Meter
from tandem_engine.scheduler.request import Kind, Request, State
from tandem_engine.scheduler.step_times import StepLoad, StepTimes
from tandem_engine.step import StepShapes

_MARGIN: Final = 0.06
"""Share of TBT kept for what lies between two steps: planning, launching, and the way out."""
_MAX_MARGIN: Final = 0.25
_ERROR_MARGIN: Final = 1.5
"""Times the learned error is kept on top of that."""
_LEAST_TOKENS: Final = 64
"""A step with prompts takes at least this many of their tokens, so that none waits forever. Fewer
take just as long: the time to read the weights."""
_LONG_SHARE: Final = 0.04
"""Share of a sequence's gaps that may be longer than its TBT, which is an objective of the 95th
percentile: a little less than it allows."""
_FORESEEN: Final = 64
"""A sequence is expected to generate so many more tokens, if its limit allows them."""
_LOOK_AHEAD: Final = 32
"""Prompts whose first token is foreseen, in the order of the queue."""
LATE_PATIENCE: Final = 20.0
"""A prompt that has lost its TTFT lets others go first for so many times that objective."""


@dataclass(slots=True)
class Allowance:
    """What is left of a step for prompts.

    Args:
        times: they tell tokens from seconds.
        seconds: what prompts may add to the step.
        rows: rows of the step so far; its decodes, padded.
    """

    times: StepTimes
    shapes: StepShapes
    seconds: float
    rows: int
    num_taken: int = 0

    def take(self, start: int, count: int) -> int:
        """How many of `count` tokens from position `start` on run in this step; 0: none.

        A chunk that must be cut ends where the step has one of the sizes that are prepared.
        """
        most = self.times.most_tokens(self.seconds, start)
        if most < count:
            most = self.shapes.fit(self.rows + most) - self.rows
            least = 0 if self.num_taken else _LEAST_TOKENS
            count = min(count, max(most, least))
        if count > 0:
            self.seconds -= self.times.seconds_of(start, count)
            self.rows += count
            self.num_taken += count
        return max(count, 0)


class StepBudget:
    """Sizes the prompt part of each step by the objectives of the requests that are there.

    The scheduler alone calls it. It costs nothing in steps without prompts.
    """

    def __init__(self, max_batched_tokens: int, shapes: StepShapes, meter: Meter) -> None:
        self.times = StepTimes()
        self._most = max_batched_tokens
        self._shapes = shapes
        self._meter = meter
        self._strictest = 0.0
        self._pace = 0.0  # seconds per prompt token, when chunks are cut for TBT
        self._step = 0.0  # seconds of such a step

    def allow(
        self,
        decodes: Sequence[Request],
        prefilling: Sequence[Request],
        waiting: Iterable[Request],
        now: float,
    ) -> Allowance | None:
        """What prompts may take of a step with these decodes; None: all of its tokens."""
        tbt, resident = 0.0, 0
        for request in decodes:
            resident += request.num_computed
            own = request.tbt_seconds
            if own and (own < tbt or not tbt):
                tbt = own
        self._strictest = tbt
        if not tbt or not self.times.is_ready:
            return None
        load = StepLoad(0, 0.0, len(decodes), resident)
        alone, step = self.times.predict(load), tbt * (1.0 - self._margin())
        allowance = Allowance(
            self.times, self._shapes, step - alone, self._shapes.pad_decodes(len(decodes))
        )
        if self._spends(allowance, alone, step, decodes, chain(prefilling, waiting), now):
            self._meter.count(metrics.LONG_STEPS)
            return None
        self._meter.count(metrics.BUDGETED_STEPS)
        return allowance

    def note_gap(self, requests: Iterable[Request], seconds: float) -> None:
        """Those of `requests` that decode had a gap of so many seconds; long ones are counted."""
        if not self._strictest or seconds <= self._strictest:
            return
        for request in requests:
            is_decode = request.state is State.DECODE
            if is_decode and request.tbt_seconds and seconds > request.tbt_seconds:
                request.num_long_gaps += 1

    def is_late(self, request: Request, num_before: int, num_own: int, now: float) -> bool:
        """Whether a prompt's first token can't come in time any more.

        Args:
            num_before: prompt tokens that are computed before its own.
            num_own: tokens of its own that are not cached.
        """
        if not request.ttft_due or request.is_late or request.first_token_sent:
            return False
        return now + self._soonest(num_before + num_own) > request.ttft_due

    def _soonest(self, num_tokens: int) -> float:
        """Seconds in which so many prompt tokens are computed, at the pace of the last steps."""
        return self._step + num_tokens * self._pace

    def _margin(self) -> float:
        return min(_MARGIN + _ERROR_MARGIN * self.times.error, _MAX_MARGIN)

    def _spends(
        self,
        allowance: Allowance,
        alone: float,
        step: float,
        decodes: Sequence[Request],
        prompts: Iterable[Request],
        now: float,
    ) -> bool:
        """Whether a whole step keeps more first tokens in time than it makes streams too slow."""
        whole = self._most - len(decodes)
        least = min(_LEAST_TOKENS, whole)
        cut = max(self.times.most_tokens(allowance.seconds, 0), least)
        self._pace, self._step = step / cut, step
        if cut >= whole:
            return False
        long = alone + self.times.seconds_of(0, whole)
        num_saved = num_tokens = 0
        for request in islice(prompts, _LOOK_AHEAD):
            num_tokens += request.num_uncomputed
            left = request.ttft_due - now
            if request.kind is Kind.REMOTE or left <= 0 or request.is_late:
                continue
            in_time_whole = -(-num_tokens // whole) * long <= left
            num_saved += in_time_whole and -(-num_tokens // cut) * step > left
        return bool(num_saved) and num_saved > _count_hurt(decodes, long, step)


def _count_hurt(decodes: Sequence[Request], gap: float, usual: float) -> int:
    """Sequences that such a gap, beside usual ones, takes beyond what their objective allows.

    Both readings of a TBT must hold: the 95th percentile of the gaps, and the mean of their
    longest tenth, by which routers judge.
    """
    num_hurt = 0
    for request in decodes:
        tbt = request.tbt_seconds
        if not tbt or gap <= tbt:
            continue
        num_left = min(request.end_length - len(request.tokens), _FORESEEN)
        num_gaps = len(request.output) + num_left
        num_long, tenth = request.num_long_gaps + 1, num_gaps / 10
        tail = num_long * gap + max(tenth - num_long, 0.0) * usual
        num_hurt += num_long > _LONG_SHARE * num_gaps or tail > max(tenth, num_long) * tbt
    return num_hurt
