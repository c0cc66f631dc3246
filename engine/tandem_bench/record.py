"""What was seen of a run under load, and what its requests had to meet."""

import math
import time
from array import array
from dataclasses import dataclass, field
from typing import Final

clock: Final = time.perf_counter
"""Seconds. Not the event loop's own time: uvloop's counts whole milliseconds."""


@dataclass(slots=True)
class RequestRecord:
    """Times are seconds after the start of the run, by a monotonic clock."""

    number: int
    scheduled: float
    """When it was due; in a closed loop, when its place became free."""
    sent: float = math.nan
    ended: float = math.nan
    requested_input: int = 0
    requested_output: int = 0
    input_tokens: int = 0
    """As the endpoint counted them; 0 when it didn't."""
    output_tokens: int = 0
    cached_tokens: int = 0
    times: "array[float]" = field(default_factory=lambda: array("d"))
    """When each piece of the answer arrived: one token a piece, or a few."""
    error: str = ""
    """Kind of failure; empty for a complete answer."""
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the answer is complete."""
        return not self.error

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first piece."""
        return self.times[0] - self.sent if self.times else math.nan

    @property
    def e2e(self) -> float:
        """Seconds from sending to the end."""
        return self.ended - self.sent

    @property
    def lag(self) -> float:
        """How late the generator itself was, seconds."""
        return self.sent - self.scheduled

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first; NaN for answers of one token."""
        if self.output_tokens < 2 or len(self.times) < 2:
            return math.nan
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1)


@dataclass(slots=True)
class RunResult:
    """What a run has seen; `pulses` are the event loop's own delays in seconds."""

    records: list[RequestRecord] = field(default_factory=list)
    pulses: "array[float]" = field(default_factory=lambda: array("d"))
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    interrupted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """What a request must meet to count as good; seconds, 0 for no objective."""

    ttft: float = 0.0
    tbt: float = 0.0
    tbt_percentile: float = 95.0  # of a request's own gaps; 100: the longest one

    @property
    def given(self) -> bool:
        """Whether there is any objective."""
        return self.ttft > 0 or self.tbt > 0
