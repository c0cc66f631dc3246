"""Goodput under an open load, in simulated time, with a whole step for prompts and with a budget.

The step times are those of an H200; see `served_load`.
"""

import random
from itertools import pairwise

import pytest

from tandem_engine import metrics
from tandem_engine.runner.decode_graphs import padded_sizes
from tandem_engine.runner.piece_graphs import piece_sizes
from tandem_engine.step import StepShapes
from tandem_engine.tests.served_load import Load, SimulatedWorker, goodput

TTFT, TBT = 0.5, 0.05
SHAPES = StepShapes(tuple(padded_sizes(256)), tuple(piece_sizes(1024)), 128)


def loaded(rate: float, *, objective: bool, seconds: float = 6.0) -> tuple[SimulatedWorker, float]:
    worker = SimulatedWorker(shapes=SHAPES)
    ttft, tbt = (TTFT, TBT) if objective else (0.0, 0.0)
    served = worker.run(Load(rate=rate, seconds=seconds, ttft=ttft, tbt=tbt))
    return worker, goodput(served, TTFT, TBT)


def test_an_objective_raises_goodput_where_whole_steps_break_tbt() -> None:
    """24 requests/s fit the GPU; with whole steps four in five have a p95 gap over 50 ms."""
    _, fixed = loaded(24, objective=False)
    worker, budget = loaded(24, objective=True)
    assert fixed < 0.5
    assert budget > 0.95
    assert worker.core.scheduler.budget.times.error < 0.05


def test_beyond_what_the_gpu_can_do_most_still_keep_both() -> None:
    _, fixed = loaded(40, objective=False)
    worker, budget = loaded(40, objective=True)
    assert fixed < 0.2
    assert budget > 0.4
    assert worker.core.scheduler.meter.counters[metrics.POSTPONED] > 0


def test_a_light_load_is_served_as_before() -> None:
    assert loaded(4, objective=False)[1] == loaded(4, objective=True)[1] == 1.0


def test_no_prompt_waits_longer_than_its_patience() -> None:
    """The late ones give way, but come before what arrives much later."""
    worker = SimulatedWorker()
    served = worker.run(Load(rate=80, seconds=4.0, ttft=0.1, tbt=0.05, num_output=32))
    order = sorted(range(len(served)), key=lambda number: served[number].times[0])
    places = {number: place for place, number in enumerate(order)}
    for number, each in enumerate(served):
        later = [other for other in range(len(served)) if served[other].sent > each.sent + 2.5]
        overtaken = [other for other in later if places[other] < places[number]]
        assert not overtaken, f"{number} was overtaken by what came 2.5 s later"


@pytest.mark.parametrize("shapes", [StepShapes(), SHAPES])
def test_a_long_prompt_leaves_the_streams_their_tbt(shapes: StepShapes) -> None:
    def longest_gap(tbt: float) -> float:
        worker = SimulatedWorker(shapes=shapes)
        rng = random.Random(3)
        for number in range(32):
            short = Load(rate=1, num_input=1024, num_output=400, tbt=tbt)
            worker.submit(f"s{number}", short, rng, worker.clock.now)
        for _ in range(120):
            worker.core.run_once()
        begin = worker.clock.now
        long = Load(rate=1, num_input=8192, num_output=4, tbt=tbt)
        worker.submit("long", long, rng, begin)
        while worker.core.scheduler.has_work:
            worker.core.run_once()
        streams = [worker.served[f"s{number}"].times for number in range(32)]
        return max(b - a for times in streams for a, b in pairwise(times) if a >= begin)

    assert longest_gap(0.0) > 0.05
    assert longest_gap(0.03) < 0.03


def test_it_finds_the_budget_again_when_the_gpu_gets_slower() -> None:
    worker = SimulatedWorker(shapes=SHAPES)
    load = Load(rate=10, seconds=4.0, ttft=TTFT, tbt=TBT)
    worker.run(load, prefix="before")
    worker.runner.slow_down = 1.6
    worker.run(load, seed=2, prefix="meanwhile")
    after = worker.run(load, seed=3, prefix="after")
    assert goodput(after, 1.0, TBT) > 0.95
