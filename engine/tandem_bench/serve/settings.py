"""How a run is driven, whatever is sent."""

from dataclasses import dataclass, field
from typing import Any

from tandem_bench.errors import WorkloadError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """Of one run."""

    concurrency: int = 0  # closed loop with so many requests in flight; 0: open loop
    num_requests: int = 0  # stop after so many; 0: only the duration counts
    duration: float = 0.0  # seconds after which nothing more is sent; 0: only the number counts
    warmup: int = 0  # requests sent first, one after the other, and not counted
    warmup_tokens: tuple[int, int] = (64, 8)  # prompt and answer of a warm-up request
    extra: dict[str, Any] = field(default_factory=dict)  # goes with every request

    def check(self) -> None:
        """Raise WorkloadError for what would never end or never begin."""
        if self.num_requests < 0 or self.duration < 0 or self.concurrency < 0 or self.warmup < 0:
            raise WorkloadError("numbers of requests and seconds must not be negative")


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
