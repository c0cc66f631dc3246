"""From a recorded workload to requests with the times at which they are due."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tandem_bench.errors import WorkloadError
from tandem_bench.workload.arrivals import arrival_times
from tandem_bench.workload.planned import PlannedRequest
from tandem_bench.workload.trace_rows import Trace, TraceRow


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """How a trace is fitted to the endpoint under test."""

    start: float = 0.0  # seconds of the trace to leave out
    speed: float = 1.0  # times faster than recorded
    sample: float = 1.0  # share of the requests to keep
    spread: bool = True  # equal timestamps are spread evenly until the next one
    length_scale: float = 1.0  # of prompts, answers and prefix blocks
    max_input: int = 0  # tokens; longer prompts are cut. 0: never
    max_output: int = 0  # tokens; longer answers are cut. 0: never

    def check(self) -> None:
        """Raise WorkloadError for values that leave nothing to replay."""
        if not (self.speed > 0 and 0 < self.sample <= 1 and self.length_scale > 0):
            raise WorkloadError(
                f"--speed {self.speed:g} and --length-scale {self.length_scale:g} must be "
                f"positive, and --sample {self.sample:g} must be more than 0 and at most 1",
                "leave them out to replay as recorded",
            )


def plan_trace(
    trace: Trace, options: ReplayOptions, rate: float | None, seed: int
) -> Iterator[PlannedRequest]:
    """The trace's requests; with a `rate` their times are a Poisson process instead.

    The order stays, so prefixes come up as recorded.
    """
    options.check()
    if not trace.timed and rate is None:
        raise WorkloadError(f"{trace.name} has no arrival times", "give --rate")
    rows = spread_ties(trace.rows, seed) if options.spread and trace.timed else trace.rows
    if options.sample < 1:
        kept = np.random.default_rng([seed, 5]).random(len(rows)) < options.sample
        rows = [row for row, keep in zip(rows, kept.tolist(), strict=True) if keep]
    first = rows[0].at + options.start if rows else 0.0
    rows = [row for row in rows if row.at >= first]
    if not rows:
        raise WorkloadError(
            "--trace-start and --sample leave nothing of the trace",
            "lower --trace-start or raise --sample",
        )
    times: Iterator[float]
    if rate is None:
        times = ((row.at - first) / options.speed for row in rows)
    else:
        times = arrival_times(rate, np.random.default_rng([seed, 6]))
    block_tokens = max(1, round(trace.block_tokens * options.length_scale))
    for number, (row, at) in enumerate(zip(rows, times, strict=False)):
        num_input = _scaled(row.input_tokens, options.length_scale, options.max_input)
        shared = min(num_input, len(row.block_ids) * block_tokens)
        yield PlannedRequest(
            number,
            at,
            num_input,
            _scaled(row.output_tokens, options.length_scale, options.max_output),
            block_ids=row.block_ids,
            block_tokens=block_tokens if row.block_ids else 0,
            shared_tokens=shared,
        )


def _scaled(tokens: int, scale: float, largest: int) -> int:
    found = max(1, round(tokens * scale))
    return min(found, largest) if largest else found


def spread_ties(rows: list[TraceRow], seed: int) -> list[TraceRow]:
    """Rows with the same time get uniform times within the recorder's quantum.

    Mooncake's conversation trace has 1,180 distinct times for 12,031 requests: replayed literally
    it would fire ten at once every three seconds. The quantum is the median step between times.
    """
    distinct = sorted({row.at for row in rows})
    if len(distinct) == len(rows) or len(distinct) < 2:
        return rows
    quantum = float(np.median(np.diff(distinct)))
    room = {
        at: min(after - at, quantum)
        for at, after in zip(distinct, [*distinct[1:], math.inf], strict=True)
    }
    counts = Counter(row.at for row in rows)
    draws = np.random.default_rng([seed, 4]).random(len(rows)).tolist()
    moved = [
        row if counts[row.at] == 1 else replace(row, at=row.at + draw * room[row.at])
        for row, draw in zip(rows, draws, strict=True)
    ]
    moved.sort(key=lambda row: row.at)
    return moved
