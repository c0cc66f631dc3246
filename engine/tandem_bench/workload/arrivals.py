"""Arrival times of an open loop."""

import math
from collections.abc import Iterator

import numpy as np

from tandem_bench.errors import WorkloadError


def arrival_times(
    rate: float, rng: np.random.Generator, burstiness: float = 1.0
) -> Iterator[float]:
    """Endless arrival times in seconds, the first after one gap.

    Gaps follow a Gamma distribution with mean 1/rate and shape `burstiness`: 1 is a Poisson
    process, less comes in bursts (the squared coefficient of variation is 1/burstiness), infinity
    is a metronome. With an infinite rate everything arrives at 0.
    """
    if not rate > 0 or not burstiness > 0:
        raise WorkloadError(
            f"--rate {rate} and --burstiness {burstiness} must both be positive",
            "use --rate inf to send everything at once",
        )
    if math.isinf(rate):
        while True:
            yield 0.0
    now = 0.0
    while True:
        if math.isinf(burstiness):
            gaps = np.full(1024, 1.0 / rate)
        else:
            gaps = rng.gamma(burstiness, 1.0 / (rate * burstiness), 1024)
        for gap in gaps.tolist():
            now += gap
            yield now
