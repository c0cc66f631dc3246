"""How long a step with prompts takes, learned from the steps that ran.

Seconds are a weighted sum of five loads of a step: one for the step itself, prompt tokens, the KV
that their attention reads, sequences that decode, and the KV that those read. The weights are a
Bayesian linear regression that forgets (a Kalman filter whose state wanders, Harvey 1989, with
Huber's bound on what one step may say). Errors count relative to the step's own length, so short
and long steps weigh the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tandem_engine.metrics import RATE_WEIGHT
from tandem_engine.step import BatchItem

_UNITS: Final = (1.0, 1024.0, 1024.0 * 8192.0, 64.0, 65536.0)
"""A common amount of each load, so that the weights are of one order."""
_SHARES: Final = (0.1, 0.9, 0.0, 0.0, 0.0)
"""Before anything is known: how much of a first step each load's weight explains."""
_DOUBTS: Final = (0.2, 0.5, 0.3, 0.2, 0.2)
"""How far each of those may be off, as a share of a step of one unit of prompt."""
_NOISE: Final = 0.05
"""Spread of steps of one load, as a share of their length."""
_BOUND: Final = 3.0
"""One step says no more than this many of `_NOISE`."""
_WANDER: Final = 1e-3
"""Share of the first doubt that a weight regains in a step: some hundred steps are remembered."""
_FAR: Final = 3.0
"""A step this many times longer or shorter than expected was not of the kind that was learned."""
_MANY_FAR: Final = 4
"""So many steps in a row that are far too long are how things are now."""


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What decides how long a step takes; all but `num_decodes` are tokens."""

    num_prompt: int
    reach: float
    """KV that prompts' attention reads: the sum of all prompt tokens' positions."""
    num_decodes: int
    resident: int
    """KV that decodes read."""

    @classmethod
    def of(cls, items: Sequence[BatchItem]) -> "StepLoad":
        """The load of a batch."""
        num_prompt = num_decodes = resident = 0
        reach = 0.0
        for item in items:
            count = len(item.tokens)
            if count == 1:
                num_decodes += 1
                resident += item.start
            else:
                num_prompt += count
                reach += chunk_reach(item.start, count)
        return cls(num_prompt, reach, num_decodes, resident)

    def parts(self) -> tuple[float, float, float, float, float]:
        """Each load in its unit."""
        return (
            1.0,
            self.num_prompt / _UNITS[1],
            self.reach / _UNITS[2],
            self.num_decodes / _UNITS[3],
            self.resident / _UNITS[4],
        )


def chunk_reach(start: int, count: int) -> float:
    """The sum of the positions of a chunk's tokens."""
    return count * (start + count / 2)


class StepTimes:
    """Predicts the seconds of steps with prompts, and learns from each.

    It starts anew when steps become several times faster than expected, as they do after whatever
    is compiled, captured or loaded at first use, or stay several times slower. A single step that
    is far too long (a capture, a neighbour on the machine) teaches nothing.
    """

    def __init__(self) -> None:
        self._weights: list[float] = []  # seconds per unit; empty: nothing was learned yet
        self._doubts: list[list[float]] = []  # covariance of the weights
        self._regained: list[float] = []
        self._most: list[float] = []
        self._num_far = 0
        self.error = 0.0
        """Recent mean of the relative errors of the predictions, before they were learned from."""

    @property
    def is_ready(self) -> bool:
        """Whether there is anything to predict from."""
        return bool(self._weights)

    def predict(self, load: StepLoad) -> float:
        """Seconds of a step."""
        return _product(self._weights, load.parts())

    def most_tokens(self, seconds: float, start: int) -> int:
        """The most prompt tokens from position `start` on that add `seconds` to a step."""
        if seconds <= 0:
            return 0
        per_reach = self._weights[2] / _UNITS[2]
        per_token = self._weights[1] / _UNITS[1] + per_reach * start
        # per_token · n + per_reach / 2 · n² = seconds, solved without a division by zero.
        root = (per_token * per_token + 2 * per_reach * seconds) ** 0.5
        most = 2 * seconds / max(per_token + root, 1e-12)
        return int(min(most, 1 << 30))

    def seconds_of(self, start: int, count: int) -> float:
        """What a chunk adds to a step."""
        reach = chunk_reach(start, count)
        return self._weights[1] * count / _UNITS[1] + self._weights[2] * reach / _UNITS[2]

    def learn(self, load: StepLoad, seconds: float) -> None:
        """Take in a step that ran; one without prompts or without a duration is left out."""
        if not load.num_prompt or seconds <= 0:
            return
        parts = load.parts()
        if not self._weights:
            self._start(parts, seconds)
            return
        expected = _product(self._weights, parts)
        if expected > _FAR * seconds:
            self._start(parts, seconds)
            return
        if seconds > _FAR * expected:
            self._num_far += 1
            if self._num_far >= _MANY_FAR:
                self._start(parts, seconds)
            return
        self._num_far = 0
        self.error += RATE_WEIGHT * (abs(expected - seconds) / seconds - self.error)
        self._update(parts, expected, seconds)

    def _start(self, parts: Sequence[float], seconds: float) -> None:
        self._num_far = 0
        self.error = 0.0
        unit = seconds / max(parts[1], 1 / 64)  # of a step of one unit of prompt
        self._weights = [share * unit for share in _SHARES]
        self._weights[0] = _SHARES[0] * seconds
        most = [(doubt * unit) ** 2 for doubt in _DOUBTS]
        most[0] = (_DOUBTS[0] * seconds) ** 2
        size = range(len(most))
        self._doubts = [[most[i] if i == j else 0.0 for j in size] for i in size]
        self._most = most
        self._regained = [_WANDER * each for each in most]

    def _update(self, parts: Sequence[float], expected: float, seconds: float) -> None:
        doubts, weights = self._doubts, self._weights
        gain = [_product(row, parts) for row in doubts]
        noise = _NOISE * seconds
        scale = 1.0 / (_product(gain, parts) + noise * noise)
        error = seconds - expected
        bound = _BOUND * max(noise, self.error * seconds)
        error = max(-bound, min(bound, error))
        for i, each in enumerate(gain):
            weights[i] = max(0.0, weights[i] + scale * each * error)
            row = doubts[i]
            for j, other in enumerate(gain):
                row[j] -= scale * each * other
            if row[i] < self._most[i]:
                row[i] += self._regained[i]


def _product(row: Sequence[float], parts: Sequence[float]) -> float:
    return (
        row[0] * parts[0]
        + row[1] * parts[1]
        + row[2] * parts[2]
        + row[3] * parts[3]
        + row[4] * parts[4]
    )
