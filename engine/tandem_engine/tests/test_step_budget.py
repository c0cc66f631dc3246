"""The step budget: what prompts get of a step beside decodes, and when they get all of it."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_engine import metrics
from tandem_engine.metrics import Meter
from tandem_engine.scheduler.request import Push, Request, State
from tandem_engine.scheduler.step_budget import Allowance, StepBudget
from tandem_engine.scheduler.step_times import StepLoad, StepTimes, chunk_reach
from tandem_engine.step import ANY_SHAPE, StepShapes
from tandem_wire.messages import SamplingParams

MOST = 2048
PER_TOKEN = 25e-6
SHAPES = StepShapes((1, 8, 16, 64, 256), (64, 128, 256, 512, 1024), 128)
NOW = 100.0


def learned_times() -> StepTimes:
    """Steps of 2 ms, 25 µs per prompt token and 50 µs per decode."""
    times = StepTimes()
    for number in range(400):
        count, decodes = 64 + number * 131 % 1900, number * 17 % 200
        load = StepLoad(count, chunk_reach(0, count), decodes, decodes * 512)
        times.learn(load, 2e-3 + PER_TOKEN * count + 5e-5 * decodes)
    return times


def a_budget(shapes: StepShapes = ANY_SHAPE) -> StepBudget:
    budget = StepBudget(MOST, shapes, Meter())
    budget.times = learned_times()
    return budget


def a_request(
    num_tokens: int = 512,
    *,
    state: State = State.WAITING,
    tbt: float = 0.0,
    due: float = 0.0,
    num_output: int = 0,
    push: Push | None = None,
) -> Request:
    request = Request(
        "r",
        tokens=[1] * (num_tokens + num_output),
        num_prompt_tokens=num_tokens,
        params=SamplingParams(max_tokens=1024),
        salt=0,
        arrival=0,
        arrival_time=NOW - 0.1,
        tbt_seconds=tbt,
        ttft_due=due,
        push=push,
    )
    request.state = state
    request.end_length = num_tokens + 1024
    if state is State.DECODE:
        request.num_computed = len(request.tokens) - 1
    return request


def decodes(count: int, tbt: float, num_output: int = 100) -> list[Request]:
    return [a_request(state=State.DECODE, tbt=tbt, num_output=num_output) for _ in range(count)]


def first_chunk(budget: StepBudget, running: Sequence[Request], *prompts: Request) -> int:
    allowance = budget.allow(running, prompts, (), NOW)
    most = min(prompts[0].num_uncomputed, MOST - len(running))
    return most if allowance is None else allowance.take(prompts[0].num_computed, most)


def test_without_an_objective_a_prompt_may_fill_the_step() -> None:
    assert first_chunk(a_budget(), decodes(8, tbt=0.0), a_request(4096)) == MOST - 8


def test_without_decodes_a_prompt_may_fill_the_step() -> None:
    assert first_chunk(a_budget(), [], a_request(4096)) == MOST


def test_before_anything_is_learned_a_prompt_may_fill_the_step() -> None:
    budget = StepBudget(MOST, ANY_SHAPE, Meter())
    assert first_chunk(budget, decodes(8, tbt=0.01), a_request(4096)) == MOST - 8


@given(st.integers(1, 200), st.floats(0.02, 0.3))
def test_a_cut_step_keeps_tbt_with_margin(count: int, tbt: float) -> None:
    chunk = first_chunk(a_budget(), decodes(count, tbt), a_request(16384))
    seconds = 2e-3 + PER_TOKEN * chunk + 5e-5 * count
    assert seconds < 0.97 * tbt
    assert seconds > 0.8 * tbt or chunk == MOST - count


def test_the_strictest_class_that_decodes_decides() -> None:
    loose, mixed = decodes(8, tbt=0.5), [*decodes(7, tbt=0.5), *decodes(1, tbt=0.03)]
    assert first_chunk(a_budget(), loose, a_request(4096)) == MOST - 8
    strict = first_chunk(a_budget(), decodes(8, tbt=0.03), a_request(4096))
    assert first_chunk(a_budget(), mixed, a_request(4096)) == pytest.approx(strict, abs=64)


def test_an_objective_that_decodes_alone_break_does_not_stop_prompts() -> None:
    assert first_chunk(a_budget(), decodes(200, tbt=0.001), a_request(4096)) == 64


def test_the_next_prompt_gets_what_the_first_one_leaves() -> None:
    allowance = a_budget().allow(decodes(8, tbt=0.03), [a_request(256)], (), NOW)
    assert allowance is not None
    assert allowance.take(0, 256) == 256
    rest = allowance.take(0, 4096)
    assert 0 < rest < 1000
    assert allowance.take(0, 4096) <= 1


@given(st.integers(1, 256), st.floats(0.001, 0.2))
def test_a_cut_step_has_a_prepared_size(count: int, seconds: float) -> None:
    rows = SHAPES.pad_decodes(count)
    allowance = Allowance(learned_times(), SHAPES, seconds, rows)
    chunk = allowance.take(0, 100_000)
    total = rows + chunk
    assert chunk == 64 or total in SHAPES.step_rows or total % SHAPES.tile == 0 or total < 64


@given(st.integers(0, 5000))
def test_a_fitting_size_is_the_largest_that_is_no_larger(rows: int) -> None:
    found = SHAPES.fit(rows)
    assert found <= rows
    if 64 <= rows <= 1024:
        assert found == max(size for size in SHAPES.step_rows if size <= rows)
    elif rows > 1024:
        assert found == rows // 128 * 128


def test_any_size_is_as_good_where_none_is_prepared() -> None:
    assert ANY_SHAPE.fit(777) == 777
    assert ANY_SHAPE.pad_decodes(33) == 33
    assert SHAPES.pad_decodes(0) == 0
    assert SHAPES.pad_decodes(9) == 16


def test_gaps_are_spent_where_that_saves_a_first_token() -> None:
    """Cut chunks would compute 2,000 tokens in four steps of 19 ms, a whole step takes 53."""
    budget, prompt = a_budget(), a_request(2000, due=NOW + 0.065)
    assert first_chunk(budget, decodes(8, tbt=0.02, num_output=400), prompt) == 2000
    assert budget._meter.counters[metrics.LONG_STEPS] == 1


@pytest.mark.parametrize(
    ("due", "num_output", "num_long"),
    [
        (NOW + 5.0, 400, 0),  # TTFT is not in danger
        (NOW + 0.01, 400, 0),  # a whole step would not keep it either
        (NOW - 1.0, 400, 0),  # it is lost
        (NOW + 0.065, 1, 3),  # the streams have had as many long gaps as they may have
    ],
)
def test_gaps_are_not_spent_otherwise(due: float, num_output: int, num_long: int) -> None:
    running = decodes(8, tbt=0.02, num_output=num_output)
    for request in running:
        request.num_long_gaps = num_long
    budget = a_budget()
    assert first_chunk(budget, running, a_request(2000, due=due)) < 800
    assert budget._meter.counters[metrics.BUDGETED_STEPS] == 1


def test_gaps_are_not_spent_on_another_workers_prompt() -> None:
    prompt = a_request(2000, due=NOW + 0.065, push=Push(0))
    assert first_chunk(a_budget(), decodes(8, tbt=0.02, num_output=400), prompt) < 800


def test_only_long_gaps_of_streams_count() -> None:
    budget, running = a_budget(), decodes(2, tbt=0.02)
    prompt = a_request(state=State.PREFILL, tbt=0.02)
    budget.note_gap([*running, prompt], 0.5)
    assert [each.num_long_gaps for each in running] == [0, 0]  # no step had an objective yet
    budget.allow(running, [prompt], (), NOW)
    budget.note_gap([*running, prompt], 0.019)
    budget.note_gap([*running, prompt], 0.05)
    assert [each.num_long_gaps for each in (*running, prompt)] == [1, 1, 0]


def test_a_first_token_is_late_when_what_is_before_it_takes_too_long() -> None:
    budget = a_budget()
    budget.allow(decodes(8, tbt=0.02), [a_request(512)], (), NOW)
    request = a_request(512, due=NOW + 0.1)
    assert not budget.is_late(request, 0, 512, NOW)
    assert budget.is_late(request, 20_000, 512, NOW)
    assert budget.is_late(request, 0, 512, NOW + 0.2)
    request.is_late = True
    assert not budget.is_late(request, 20_000, 512, NOW)  # once only


def test_one_with_a_first_token_or_without_an_objective_is_never_late() -> None:
    budget = a_budget()
    assert not budget.is_late(a_request(512), 1 << 20, 512, NOW)
    streamed = a_request(512, due=NOW - 1)
    streamed.first_token_sent = True
    assert not budget.is_late(streamed, 0, 512, NOW)
