"""Counters and samples that become metrics."""

from collections import defaultdict
from typing import Final

RATE_WEIGHT: Final = 0.2
"""Weight of the newest sample in a running mean."""
MIN_RATE_TOKENS: Final = 32
"""Steps with fewer prompt tokens say nothing about the prefill rate."""


class Meter:
    """Totals since the start, samples since the last report, and recent means."""

    def __init__(self) -> None:
        self.counters: defaultdict[str, float] = defaultdict(float)
        self._observations: defaultdict[str, list[float]] = defaultdict(list)
        self.step_seconds = 0.0  # recent mean of steps without prompt tokens
        self.prefill_rate = 0.0  # prompt tokens per second of steps that have some; 0: not measured

    def count(self, name: str, amount: float = 1.0) -> None:
        """Add to a total."""
        self.counters[name] += amount

    def observe(self, name: str, value: float) -> None:
        """Add a sample."""
        self._observations[name].append(value)

    def take_observations(self) -> dict[str, list[float]]:
        """Samples since the last call."""
        taken = dict(self._observations)
        self._observations.clear()
        return taken

    def record_step(
        self, seconds: float, num_items: int, num_decoded: int, num_prompt: int
    ) -> None:
        """One executed step: its duration, its items, their decoded and their prompt tokens."""
        self.observe("step_seconds", seconds)
        self.observe("step_batch_size", num_items)
        self.count("steps_total")
        self.count("prefill_tokens_total", num_prompt)
        self.count("decode_tokens_total", num_decoded)
        if num_prompt == 0:
            self.step_seconds = _mean(self.step_seconds, seconds)
        elif num_prompt >= MIN_RATE_TOKENS and seconds > 0:
            self.prefill_rate = _mean(self.prefill_rate, num_prompt / seconds)


def _mean(old: float, new: float) -> float:
    return new if old == 0 else old + RATE_WEIGHT * (new - old)
