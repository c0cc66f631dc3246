"""Steps that are launched before the results of the one before are known."""

from typing import Any

import pytest

from tandem_engine.tests.fleet import Fleet, LateRunner, expected_tokens
from tandem_wire.messages import Cancel, SamplingParams

PROMPT = [40 + i % 50 for i in range(30)]


def make_fleet(**flags: Any) -> Fleet:
    return Fleet("a", late=True, **flags)


def num_ahead(fleet: Fleet) -> int:
    runner = fleet["a"].runner
    assert isinstance(runner, LateRunner)
    return runner.num_ahead


def stream_of(fleet: Fleet, rid: str) -> list[int]:
    return fleet["a"].streams[rid].tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decodes_run_ahead_and_give_the_same_tokens(temperature: float) -> None:
    fleet = make_fleet()
    params: dict[str, Any] = {
        "max_tokens": 40,
        "temperature": temperature,
        "seed": 3,
        "ignore_eos": True,
    }
    for number in range(5):
        fleet["a"].submit(f"r{number}", PROMPT[number:], params=params)
    fleet.settle()
    for number in range(5):
        expected = expected_tokens(PROMPT[number:], SamplingParams(**params), 30 - number)
        assert stream_of(fleet, f"r{number}") == expected
    assert num_ahead(fleet) >= 35


def test_a_length_is_never_exceeded_and_no_step_runs_after_it() -> None:
    fleet = make_fleet()
    fleet["a"].submit("r", PROMPT, params={"max_tokens": 10, "ignore_eos": True})
    fleet.settle()
    assert len(stream_of(fleet, "r")) == 10
    assert fleet["a"].stats().counters["decode_tokens_total"] == 9


def test_a_stop_that_comes_while_the_next_step_runs_ends_the_stream_there() -> None:
    fleet = make_fleet()
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    tokens = expected_tokens(PROMPT, params, 30)
    stop = tokens[7]
    first = tokens.index(stop)
    fleet["a"].submit("r", PROMPT, params={"max_tokens": 30, "stop_token_ids": [stop]})
    fleet["a"].submit("other", PROMPT[2:], params={"max_tokens": 30, "ignore_eos": True})
    fleet.settle()
    assert stream_of(fleet, "r") == tokens[: first + 1]
    assert fleet["a"].streams["r"].ends == ["stop"]
    assert stream_of(fleet, "other") == expected_tokens(PROMPT[2:], params, 28)


def test_penalties_wait_for_every_token() -> None:
    fleet = make_fleet()
    params = {"max_tokens": 12, "frequency_penalty": 0.5, "ignore_eos": True}
    fleet["a"].submit("r", PROMPT, params=params)
    fleet.settle()
    assert len(stream_of(fleet, "r")) == 12
    assert num_ahead(fleet) == 0


def test_what_arrives_meanwhile_is_taken_before_the_next_step() -> None:
    fleet = make_fleet()
    fleet["a"].submit("r", PROMPT, params={"max_tokens": 200, "ignore_eos": True})
    for _ in range(20):
        fleet.step()
    fleet["a"].submit("late", PROMPT[5:], params={"max_tokens": 3, "ignore_eos": True})
    fleet["a"].core.post(Cancel("r"))
    for _ in range(8):
        fleet.step()
    assert fleet["a"].streams["r"].ends == ["cancelled"]
    assert fleet["a"].streams["late"].ends == ["length"]
    assert fleet["a"].stats().ledger["owned"] == 0


def test_scarce_blocks_preempt_between_steps() -> None:
    fleet = make_fleet(model="mock://tiny?blocks=16&max_len=120")
    params: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "temperature": 0.0}
    for number in range(4):
        fleet["a"].submit(f"r{number}", PROMPT[number:], params=params)
    fleet.settle()
    for number in range(4):
        expected = expected_tokens(PROMPT[number:], SamplingParams(**params), 30 - number)
        assert stream_of(fleet, f"r{number}") == expected
    assert fleet["a"].stats().counters["preemptions_total"] > 0
    assert num_ahead(fleet) > 0
