"""Step times: what is learned, from few steps, and in spite of steps that are far off."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_engine.scheduler.step_times import StepLoad, StepTimes, chunk_reach
from tandem_engine.step import BatchItem
from tandem_wire.messages import SamplingParams

PARAMS = SamplingParams(max_tokens=1)


def a_load(rng: random.Random, most: int = 2048) -> StepLoad:
    count, start = rng.randrange(64, most), rng.randrange(0, 8192)
    decodes = rng.randrange(0, 256)
    return StepLoad(count, chunk_reach(start, count), decodes, decodes * rng.randrange(64, 2048))


def true_seconds(load: StepLoad) -> float:
    """Near an H200 with Llama-3.1-8B's shape."""
    seconds = 3e-3 + 2.3e-5 * load.num_prompt + 5e-10 * load.reach
    return seconds + 5e-6 * load.num_decodes + 4.6e-8 * load.resident


def taught(num_steps: int, seed: int = 0, spread: float = 0.02) -> StepTimes:
    times, rng = StepTimes(), random.Random(seed)
    for _ in range(num_steps):
        load = a_load(rng)
        times.learn(load, true_seconds(load) * rng.uniform(1 - spread, 1 + spread))
    return times


def mean_error(times: StepTimes, seed: int = 99) -> float:
    rng = random.Random(seed)
    loads = [a_load(rng) for _ in range(200)]
    return sum(abs(times.predict(x) / true_seconds(x) - 1) for x in loads) / len(loads)


def test_one_step_is_enough_for_a_first_guess() -> None:
    times = StepTimes()
    assert not times.is_ready
    times.learn(StepLoad(2048, chunk_reach(0, 2048), 8, 8192), 0.05)
    assert times.is_ready
    assert 0.3 * 0.05 < times.predict(StepLoad(1024, chunk_reach(0, 1024), 8, 8192)) < 0.05


@given(st.integers(0, 50))
def test_a_few_dozen_steps_teach_all_five_weights(seed: int) -> None:
    times = taught(60, seed)
    assert mean_error(times) < 0.08
    assert times.error < 0.15


def test_the_error_it_reports_is_that_of_its_predictions() -> None:
    exact, noisy = taught(300, spread=0.0), taught(300, spread=0.2)
    assert exact.error < 0.02 < 0.05 < noisy.error < 0.25


def test_steps_without_prompts_teach_nothing() -> None:
    times = StepTimes()
    times.learn(StepLoad(0, 0.0, 100, 100_000), 0.01)
    times.learn(StepLoad(64, 0.0, 100, 100_000), 0.0)
    assert not times.is_ready


def test_a_single_step_that_is_far_too_long_changes_nothing() -> None:
    times = taught(100)
    load = StepLoad(1024, chunk_reach(0, 1024), 32, 32768)
    before = times.predict(load)
    times.learn(load, 1.0)
    assert times.predict(load) == before


def test_it_starts_anew_when_steps_stay_too_long() -> None:
    times = taught(100)
    load = StepLoad(1024, chunk_reach(0, 1024), 32, 32768)
    for _ in range(10):
        times.learn(load, 5 * true_seconds(load))
    assert times.predict(load) == pytest.approx(5 * true_seconds(load), rel=0.1)


def test_it_starts_anew_after_a_slow_first_step() -> None:
    """The first step of a process may compile, capture or load what later ones have."""
    times = StepTimes()
    load = StepLoad(1024, chunk_reach(0, 1024), 32, 32768)
    times.learn(load, 3.0)
    times.learn(load, true_seconds(load))
    assert times.predict(load) == pytest.approx(true_seconds(load), rel=0.05)


def test_it_follows_a_machine_that_slows_down() -> None:
    times, rng = taught(300), random.Random(5)
    for _ in range(300):
        load = a_load(rng)
        times.learn(load, 1.5 * true_seconds(load))
    rng = random.Random(6)
    loads = [a_load(rng) for _ in range(100)]
    errors = [abs(times.predict(x) / (1.5 * true_seconds(x)) - 1) for x in loads]
    assert sum(errors) / len(errors) < 0.08


@given(st.integers(0, 30), st.floats(0.0, 0.2), st.integers(0, 32768))
def test_the_most_tokens_of_some_seconds_take_those_seconds(
    seed: int, seconds: float, start: int
) -> None:
    times = taught(50, seed)
    most = times.most_tokens(seconds, start)
    assert times.seconds_of(start, most) <= seconds + 1e-9
    assert times.seconds_of(start, most + 1) > seconds - 1e-9


def test_no_seconds_are_no_tokens() -> None:
    assert taught(20).most_tokens(-0.01, 0) == 0


def test_the_load_of_a_batch_counts_prompts_and_decodes() -> None:
    def item(start: int, count: int) -> BatchItem:
        return BatchItem("r", [1] * count, start, [0], True, PARAMS)

    load = StepLoad.of([item(100, 1), item(50, 1), item(64, 32), item(0, 8)])
    assert load == StepLoad(40, 32 * (64 + 16) + 8 * 4, 2, 150)
