"""What is measured for one decision; plain numbers, seconds and tokens."""

from dataclasses import dataclass
from typing import Final

WINDOW_SECONDS: Final = 30.0
"""How far back rates and latencies look."""


@dataclass(frozen=True)
class PrefillSignals:
    """What is measured of prefill.

    `ttft_seconds` is the objective's percentile over the window, None when no request finished its
    first token in it. `queued_seconds` is the backlog summed over the pool: the time one worker
    would need for all waiting prompt tokens; `peak_queued_seconds` is its maximum in the window.
    `busy_workers` is the prefill work done lately, in workers: prompt tokens computed per second
    over the measured tokens per second of one worker.
    """

    ttft_seconds: float | None = None
    queued_seconds: float = 0.0
    peak_queued_seconds: float = 0.0
    busy_workers: float = 0.0


@dataclass(frozen=True)
class DecodeSignals:
    """What is measured of decode.

    `kv_usage` is the share of KV blocks in use, summed over the pool and divided by the pool's
    size (0 to 1); `max_kv_usage` is that of the fullest worker. `num_waiting` counts requests that
    found no room yet; `peak_running` is the most streams that one worker had in the window.
    """

    tbt_seconds: float | None = None
    kv_usage: float = 0.0
    max_kv_usage: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    peak_running: int = 0


@dataclass(frozen=True)
class ClassSignals:
    """What the routers measured of one SLO class, at the percentile of the class.

    Each figure is None when no request of the class ended in the window.
    """

    name: str
    ttft_seconds: float | None = None
    tbt_seconds: float | None = None
    attained_percent: float | None = None


@dataclass(frozen=True)
class Signals:
    """The signals of one reading.

    `age_seconds`: since the last complete scrape, whose figures these are; inf when there was none.
    `settled`: readings go back a whole window without a break, enough to say what isn't needed.
    `idle_seconds`: for how long no request has arrived or run, as far as readings go back.
    `attained_percent`: the share of sequences that kept their objectives, None without any.
    `wanted`: requests arrived lately or are waiting, by the routers that answered in this reading,
    complete or not. It is all that waking a service at zero depends on.
    """

    age_seconds: float = float("inf")
    settled: bool = True
    requests_per_second: float = 0.0
    num_inflight: int = 0
    idle_seconds: float = 0.0
    attained_percent: float | None = None
    wanted: bool = False
    prefill: PrefillSignals = PrefillSignals()
    decode: DecodeSignals = DecodeSignals()
    classes: tuple[ClassSignals, ...] = ()

    @property
    def idle(self) -> bool:
        """Whether nothing arrives and nothing runs: that is a measurement, not a missing one."""
        return self.requests_per_second == 0 and self.num_inflight == 0 and not self.wanted
