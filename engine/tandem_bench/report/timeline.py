"""A run over time, in bins."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from tandem_bench.record import RequestRecord

NUM_BINS: Final = 120

Floats = npt.NDArray[np.float64]


class Timeline(msgspec.Struct, frozen=True):
    """Equal bins of `step` seconds; rates per second."""

    step: float = 1.0
    output_per_second: list[float] = []
    sent_per_second: list[float] = []
    completed_per_second: list[float] = []
    in_flight: list[float] = []
    """Mean over the bin."""
    ttft_p50: list[float | None] = []
    """Of requests sent in the bin, seconds; None where none was."""
    ttft_p99: list[float | None] = []


def build_timeline(records: Sequence[RequestRecord], seconds: float) -> Timeline:
    """At most 120 bins of a round width."""
    if not records or seconds <= 0:
        return Timeline()
    step = round_step(seconds / NUM_BINS)
    edges: Floats = np.arange(math.ceil(seconds / step) + 1, dtype=np.float64) * step
    pieces = np.concatenate([np.frombuffer(record.times) for record in records])
    sent = np.array([record.sent for record in records])
    ended = np.array([record.ended for record in records])
    ttft = np.array([record.ttft if record.ok else math.nan for record in records])
    whole = ended[[record.ok for record in records]]
    ratio = _tokens_per_piece(records)
    places = np.clip((sent / step).astype(int), 0, len(edges) - 2)
    p50: list[float | None] = []
    p99: list[float | None] = []
    for place in range(len(edges) - 1):
        some = ttft[places == place]
        some = some[np.isfinite(some)]
        p50.append(float(np.percentile(some, 50)) if len(some) else None)
        p99.append(float(np.percentile(some, 99)) if len(some) else None)
    return Timeline(
        step=step,
        output_per_second=(np.histogram(pieces, edges)[0] * ratio / step).tolist(),
        sent_per_second=(np.histogram(sent, edges)[0] / step).tolist(),
        completed_per_second=(np.histogram(whole, edges)[0] / step).tolist(),
        in_flight=_mean_in_flight(sent, ended, edges, step),
        ttft_p50=p50,
        ttft_p99=p99,
    )


def _tokens_per_piece(records: Sequence[RequestRecord]) -> float:
    pieces = sum(len(record.times) for record in records if record.ok)
    return sum(record.output_tokens for record in records if record.ok) / pieces if pieces else 1.0


def _mean_in_flight(
    sent: Floats,
    ended: Floats,
    edges: Floats,
    step: float,
) -> list[float]:
    """Seconds that requests spent in each bin, over its width."""
    ended = np.where(np.isfinite(ended), ended, edges[-1])

    def area(starts: Floats) -> list[float]:
        # ∫ (number of starts before t) dt up to each edge.
        ordered = np.sort(starts)
        totals = np.concatenate([[0.0], np.cumsum(ordered)])
        before = np.searchsorted(ordered, edges)
        found: list[float] = (before * edges - totals[before]).tolist()
        return found

    begun, finished = area(sent), area(ended)
    spent = [a - b for a, b in zip(begun, finished, strict=True)]
    return [max(0.0, (b - a) / step) for a, b in pairwise(spent)]


def round_step(width: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `width`."""
    power = 10.0 ** math.floor(math.log10(width))
    for factor in (1.0, 2.0, 5.0):
        if factor * power >= width * (1 - 1e-9):
            return factor * power
    return 10.0 * power
