"""One run in numbers."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from tandem_bench.record import Objectives, RequestRecord, RunResult
from tandem_bench.report.distribution import Distribution
from tandem_bench.report.timeline import Timeline, build_timeline

LATE_SECONDS: Final = 0.01
"""A p99 of the generator's own delay above this is warned of."""
TAIL_SHARE: Final = 0.1
"""The tail gap of a request is the mean of its longest gaps, this share of them."""
NUM_LONGEST: Final = 10
NUM_CANDIDATES: Final = 2000

Floats = npt.NDArray[np.float64]


class Stall(msgspec.Struct, frozen=True):
    """One of the longest pauses in the middle of answers; seconds."""

    seconds: float
    request: int
    """The one that waited longest."""
    at: float
    """When it ended, after the start of the run."""
    piece: int
    """Position in the answer of the piece that was waited for."""
    num_requests: int
    """How many answers paused together."""


class Failure(msgspec.Struct, frozen=True):
    """Requests that failed the same way."""

    kind: str
    count: int
    example: str


class Goodput(msgspec.Struct, frozen=True):
    """Requests that met every objective; a failed request meets none."""

    count: int = 0
    share: float = 0.0
    requests_per_second: float = 0.0
    ttft_share: float = 0.0
    tbt_share: float = 0.0


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run, in seconds and tokens. Latencies are those of complete answers."""

    label: str
    rate: float | None
    """Requests per second that were asked for; None: a closed loop or a trace's own times."""
    seconds: float
    sent: int
    completed: int
    failed: int
    offered_per_second: float
    """Requests really sent per second, from the first to the last."""
    requests_per_second: float
    input_per_second: float
    output_per_second: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    pieces: int
    peak_in_flight: int
    ttft: Distribution
    tbt: Distribution
    """Every gap between two pieces of every answer."""
    tpot: Distribution
    e2e: Distribution
    tail_gap: Distribution
    stalls: list[Stall]
    goodput: Goodput | None
    failures: list[Failure]
    lag: Distribution
    """How late requests were sent."""
    loop_lag: Distribution
    """How late the generator's event loop was for a timer."""
    generator_cpu: float
    """Share of one core that the generator used."""
    interrupted: bool
    timeline: Timeline
    warnings: list[str]


def summarize(result: RunResult, label: str, rate: float | None, objectives: Objectives) -> Summary:
    """The figures that reports show of one run."""
    sent = [record for record in result.records if math.isfinite(record.sent)]
    whole = [record for record in sent if record.ok]
    gaps = [np.diff(np.frombuffer(record.times)) for record in whole]
    seconds = max((record.ended for record in sent), default=0.0) or result.seconds
    per_second = 1.0 / seconds if seconds > 0 else 0.0
    lag = Distribution.of(record.lag for record in sent)
    loop_lag = Distribution.of(result.pulses)
    cpu = result.cpu_seconds / result.seconds if result.seconds else 0.0
    timeline = build_timeline(sent, seconds)
    input_tokens = sum(record.input_tokens or record.requested_input for record in whole)
    output_tokens = sum(record.output_tokens for record in whole)
    span = max((r.sent for r in sent), default=0.0) - min((r.sent for r in sent), default=0.0)
    return Summary(
        label=label,
        rate=rate,
        seconds=seconds,
        sent=len(sent),
        completed=len(whole),
        failed=sum(1 for record in sent if not record.ok),
        offered_per_second=(len(sent) - 1) / span if span > 0 else 0.0,
        requests_per_second=len(whole) * per_second,
        input_per_second=input_tokens * per_second,
        output_per_second=output_tokens * per_second,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_tokens=sum(record.cached_tokens for record in whole),
        pieces=sum(len(record.times) for record in whole),
        peak_in_flight=peak_in_flight(sent),
        ttft=Distribution.of(record.ttft for record in whole),
        tbt=Distribution.of(np.concatenate(gaps).tolist() if gaps else ()),
        tpot=Distribution.of(record.tpot for record in whole),
        e2e=Distribution.of(record.e2e for record in whole),
        tail_gap=Distribution.of(tail_gap(some) for some in gaps if len(some)),
        stalls=find_stalls(whole, gaps),
        goodput=measure_goodput(sent, objectives, seconds) if objectives.given else None,
        failures=count_failures(sent),
        lag=lag,
        loop_lag=loop_lag,
        generator_cpu=cpu,
        interrupted=result.interrupted,
        timeline=timeline,
        warnings=find_warnings(lag, loop_lag, cpu),
    )


def tail_gap(gaps: Floats) -> float:
    """Mean of the longest tenth of a request's gaps, at least one of them."""
    count = max(1, math.ceil(len(gaps) * TAIL_SHARE))
    return float(np.partition(gaps, len(gaps) - count)[-count:].mean())


def find_stalls(records: Sequence[RequestRecord], gaps: Sequence[Floats]) -> list[Stall]:
    """The longest of the run. Gaps that overlap by half are one stall of several requests."""
    everything = np.concatenate(gaps) if gaps else np.empty(0)
    if not len(everything):
        return []
    starts = np.concatenate([[0], np.cumsum([len(some) for some in gaps])])
    longest = np.argsort(everything)[::-1][:NUM_CANDIDATES]
    found: list[tuple[Stall, set[int]]] = []
    for place in longest.tolist():
        which = int(np.searchsorted(starts, place, side="right")) - 1
        record, piece = records[which], place - int(starts[which]) + 1
        at, seconds = record.times[piece], float(everything[place])
        same = next((s for s in found if abs(s[0].at - at) < s[0].seconds / 2), None)
        if same is not None:
            same[1].add(record.number)
        elif len(found) < NUM_LONGEST:
            found.append((Stall(seconds, record.number, at, piece, 1), {record.number}))
    return [
        Stall(stall.seconds, stall.request, stall.at, stall.piece, len(numbers))
        for stall, numbers in found
    ]


def measure_goodput(
    records: Sequence[RequestRecord], objectives: Objectives, seconds: float
) -> Goodput:
    """The share of all sent requests that met the objectives."""
    met_ttft = [_meets_ttft(record, objectives) for record in records]
    met_tbt = [_meets_tbt(record, objectives) for record in records]
    count = sum(a and b for a, b in zip(met_ttft, met_tbt, strict=True))
    total = len(records) or 1
    return Goodput(
        count=count,
        share=count / total,
        requests_per_second=count / seconds if seconds > 0 else 0.0,
        ttft_share=sum(met_ttft) / total,
        tbt_share=sum(met_tbt) / total,
    )


def _meets_ttft(record: RequestRecord, objectives: Objectives) -> bool:
    return record.ok and (objectives.ttft <= 0 or record.ttft <= objectives.ttft)


def _meets_tbt(record: RequestRecord, objectives: Objectives) -> bool:
    if not record.ok or objectives.tbt <= 0 or len(record.times) < 2:
        return record.ok
    gaps = np.diff(np.frombuffer(record.times))
    return bool(np.percentile(gaps, objectives.tbt_percentile) <= objectives.tbt)


def count_failures(records: Sequence[RequestRecord]) -> list[Failure]:
    """By kind, the most frequent first, each with one example."""
    counts = Counter(record.error for record in records if record.error)
    examples = {record.error: record.detail for record in records if record.error}
    return [Failure(kind, count, examples[kind][:300]) for kind, count in counts.most_common()]


def peak_in_flight(records: Sequence[RequestRecord]) -> int:
    """The largest number of requests under way at any time."""
    changes = [(record.sent, 1) for record in records]
    changes += [(record.ended, -1) for record in records if math.isfinite(record.ended)]
    peak = current = 0
    for _, change in sorted(changes):
        current += change
        peak = max(peak, current)
    return peak


def find_warnings(lag: Distribution, loop_lag: Distribution, cpu: float) -> list[str]:
    """Warnings about the generator that make the figures less reliable."""
    found = []
    if lag.p99 > LATE_SECONDS:
        found.append(
            f"requests were sent late (p99 {lag.p99 * 1e3:.1f} ms): "
            "the load was lower and burstier than asked for"
        )
    if loop_lag.p99 > LATE_SECONDS:
        found.append(
            f"the generator was busy (p99 {loop_lag.p99 * 1e3:.1f} ms late for its own timers): "
            "TTFT and gaps include that"
        )
    if cpu > 0.9:
        found.append(f"the generator used {cpu:.0%} of a core: lower the rate, or run several")
    return found
