"""Percentiles of a sample, and enough of its shape to draw it."""

from collections.abc import Iterable
from typing import Final

import msgspec
import numpy as np

LEVELS: Final = (
    *range(100),
    *(99 + step / 10 for step in range(1, 10)),
    *(99.95, 99.99, 99.999, 100),
)
"""Percentiles kept for drawing; finer where tails are."""


class Distribution(msgspec.Struct, frozen=True):
    """How values in seconds are distributed; all zero when there are none.

    Percentiles are interpolated linearly between order statistics (numpy's default).
    """

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    largest: float = 0.0
    curve: list[tuple[float, float]] = []
    """(percentile, value), ascending."""

    @classmethod
    def of(cls, values: Iterable[float]) -> "Distribution":
        """The distribution of the values, leaving out NaN and infinities."""
        found = np.fromiter(values, dtype=np.float64)
        found = found[np.isfinite(found)]
        if not len(found):
            return cls()
        at = np.percentile(found, LEVELS)
        p50, p90, p95, p99 = np.percentile(found, (50, 90, 95, 99)).tolist()
        return cls(
            count=len(found),
            mean=float(found.mean()),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            largest=float(found.max()),
            curve=list(zip(map(float, LEVELS), at.tolist(), strict=True)),
        )
