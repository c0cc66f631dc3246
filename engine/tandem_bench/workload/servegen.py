"""ServeGen's published form: per client and window a distribution of gaps, and of lengths.

Arrivals: `client, window_start_s, rate_rps, cv, pattern, shape, scale` for windows of 600 s. Gaps
are drawn from the named distribution (Gamma or Weibull) and scaled so that the window has its rate
(arXiv:2505.09999). Lengths: quantiles per client and window of 21,600 s, interpolated.
"""

import csv
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np

from tandem_bench.errors import WorkloadError
from tandem_bench.workload.trace_rows import TraceRow, read_text

WINDOW_SECONDS: Final = 600.0
LENGTH_SECONDS: Final = 21600.0
MAX_REQUESTS: Final = 200_000
"""Nobody replays weeks of hundreds of requests a second: reading ends with the window that reaches
this number."""
_LEVELS: Final = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_COLUMNS: Final = ("p5", "p5", "p25", "p50", "p75", "p90", "p95", "p99", "max")

Quantiles = dict[str, dict[tuple[float, str], list[float]]]
"""By client, then by window and field: values at `_LEVELS`."""


def read_servegen(path: Path, arrivals: str, seed: int) -> list[TraceRow]:
    """Draw the requests; times are seconds of the release's own clock."""
    beside = path.with_name(path.name.replace("_arrivals", "_lengths"))
    if beside == path or not beside.exists():
        raise WorkloadError(
            f"{path} needs its lengths in a file {beside.name} beside it",
            "put both files in one folder",
        )
    quantiles = _read_quantiles(read_text(beside))
    rng = np.random.default_rng([seed, 3])
    windows = sorted(
        csv.DictReader(arrivals.splitlines()), key=lambda row: float(row["window_start_s"])
    )
    rows: list[TraceRow] = []
    for _, together in groupby(windows, key=lambda row: row["window_start_s"]):
        for row in together:
            rows += _draw_window(row, quantiles, rng)
        if len(rows) >= MAX_REQUESTS:
            break
    return rows


def _read_quantiles(text: str) -> Quantiles:
    found: Quantiles = {}
    for row in csv.DictReader(text.splitlines()):
        levels = [float(row[column]) for column in _COLUMNS]
        found.setdefault(row["client"], {})[float(row["window_start_s"]), row["field"]] = levels
    return found


def _draw_window(
    row: dict[str, str], quantiles: Quantiles, rng: np.random.Generator
) -> Iterator[TraceRow]:
    start = float(row["window_start_s"])
    found = _lengths_of(row["client"], start, quantiles)
    if found is None:
        return
    expected = float(row["rate_rps"]) * WINDOW_SECONDS
    count = int(rng.poisson(expected)) if expected < 50 else round(expected)
    if count < 1:
        return
    shape = float(row["shape"])
    gaps = (
        rng.gamma(shape, 1.0, count + 1)
        if row["pattern"] == "Gamma"
        else rng.weibull(shape, count + 1)
    )
    times = start + np.cumsum(gaps)[:count] * (WINDOW_SECONDS / max(gaps.sum(), 1e-12))
    lengths = [
        np.interp(rng.random(count), _LEVELS, levels).round().clip(1).astype(int).tolist()
        for levels in found
    ]
    for at, num_input, num_output in zip(times.tolist(), *lengths, strict=True):
        yield TraceRow(at, num_input, num_output)


def _lengths_of(
    client: str, start: float, quantiles: Quantiles
) -> tuple[list[float], list[float]] | None:
    """Lengths of the window or the nearest one; None for clients published without any."""
    own = quantiles.get(client, {})
    window = math.floor(start / LENGTH_SECONDS) * LENGTH_SECONDS
    for at in sorted({at for at, _ in own}, key=lambda at: abs(at - window)):
        num_input, num_output = own.get((at, "input_tokens")), own.get((at, "output_tokens"))
        if num_input is not None and num_output is not None:
            return num_input, num_output
    return None
