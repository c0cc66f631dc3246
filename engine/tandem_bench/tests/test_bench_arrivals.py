"""Arrival processes have the statistics that they claim."""

import math
from itertools import islice

import numpy as np
import pytest

from tandem_bench.errors import WorkloadError
from tandem_bench.workload.arrivals import arrival_times

COUNT = 20_000


def gaps_of(rate: float, burstiness: float = 1.0) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    times = arrival_times(rate, np.random.default_rng(7), burstiness)
    return np.diff([0.0, *islice(times, COUNT)])


@pytest.mark.parametrize("rate", [0.5, 20.0, 1000.0])
@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_mean_and_variation_of_the_gaps(rate: float, burstiness: float) -> None:
    gaps = gaps_of(rate, burstiness)
    assert gaps.mean() * rate == pytest.approx(1.0, rel=0.04)
    variation = gaps.std() / gaps.mean()
    assert variation**2 == pytest.approx(1 / burstiness, rel=0.12)


def test_a_poisson_process_has_as_much_variance_as_mean_in_every_window() -> None:
    times = np.cumsum(gaps_of(50.0))
    counts = np.bincount((times / 0.5).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.15)


def test_a_metronome_and_all_at_once() -> None:
    assert gaps_of(10.0, math.inf) == pytest.approx(np.full(COUNT, 0.1))
    assert not gaps_of(math.inf).any()


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0)])
def test_impossible_processes_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(WorkloadError, match="must both be positive"):
        next(arrival_times(rate, np.random.default_rng(0), burstiness))
