"""Runners that give a sequence several tokens in one step."""

from typing import Any

import pytest

from tandem_engine.handoff.events import PushChunk
from tandem_engine.step import Batch, SampledTokens
from tandem_engine.tests.fleet import (
    Fleet,
    LateRunner,
    SeveralRunner,
    assert_clean,
    expected_tokens,
    posted,
    prompt,
)
from tandem_wire.messages import SamplingParams

NUM_TOKENS = 4


def make_fleet(*names: str, **flags: Any) -> Fleet:
    return Fleet(*(names or ("a",)), step_tokens=NUM_TOKENS, **flags)


def greedy(**fields: Any) -> tuple[dict[str, Any], SamplingParams]:
    values = {"temperature": 0.0, **fields}
    return values, SamplingParams(**values)


def num_extra(fleet: Fleet, name: str = "a") -> int:
    runner = fleet[name].runner
    assert isinstance(runner, SeveralRunner)
    return runner.num_extra


def test_a_step_streams_all_its_tokens_in_one_item() -> None:
    fleet = make_fleet()
    fields, params = greedy(max_tokens=40, logprobs=2)
    fleet["a"].submit("r", prompt(30), params=fields)
    fleet.settle()
    stream = fleet["a"].streams["r"]
    assert stream.tokens == expected_tokens(prompt(30), params, 30)
    sizes = [len(item.tokens) for item in stream.items]
    assert max(sizes) == NUM_TOKENS
    assert sum(sizes) == 40
    for item in stream.items:
        assert item.logprobs is not None
        assert [found.top_ids[0] for found in item.logprobs] == item.tokens
    assert num_extra(fleet) >= 10
    assert_clean(fleet)


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_a_length_is_exact_and_the_rest_is_dropped(max_tokens: int) -> None:
    fleet = make_fleet()
    fields, params = greedy(max_tokens=max_tokens, logprobs=1)
    fleet["a"].submit("r", prompt(30), params=fields)
    fleet.settle()
    stream = fleet["a"].streams["r"]
    assert stream.tokens == expected_tokens(prompt(30), params, 30)
    assert stream.ends == ["length"]
    assert sum(len(item.logprobs or []) for item in stream.items) == max_tokens
    assert_clean(fleet)


@pytest.mark.parametrize("place", range(12))
def test_a_stop_ends_the_stream_at_its_token_and_drops_the_rest(place: int) -> None:
    fleet = make_fleet()
    tokens = expected_tokens(prompt(30), SamplingParams(max_tokens=30, temperature=0.0), 30)
    fields, params = greedy(max_tokens=30, stop_token_ids=[tokens[place]], min_tokens=2)
    fleet["a"].submit("r", prompt(30), params=fields)
    fleet.settle()
    stream = fleet["a"].streams["r"]
    assert stream.tokens == expected_tokens(prompt(30), params, 30)
    assert stream.ends == ["stop" if tokens[place] in stream.tokens[2:] else "length"]
    assert_clean(fleet)


def test_the_kv_of_kept_tokens_is_found_again_and_no_more() -> None:
    fleet = make_fleet()
    fields, params = greedy(max_tokens=21)
    fleet["a"].submit("first", prompt(30), params=fields)
    fleet.settle()
    tokens = [*prompt(30), *expected_tokens(prompt(30), params, 30)]
    fleet["a"].submit("again", [*tokens, 40], params=fields)
    fleet.settle()
    # All 51 tokens but the last, whose KV no step has computed.
    assert fleet["a"].streams["again"].items[0].num_cached_tokens == 50
    assert fleet["a"].streams["again"].tokens == expected_tokens([*tokens, 40], params, 52)


def test_a_remote_prefill_commits_the_first_token_alone() -> None:
    fleet = make_fleet("d", "p")
    fields, params = greedy(max_tokens=9)
    for number in range(6):
        tokens = prompt(60 + number, start=number)
        fleet["d"].submit(f"r{number}", tokens, peers=("p",), params=fields)
    fleet.settle()
    for number in range(6):
        tokens = prompt(60 + number, start=number)
        stream = fleet["d"].streams[f"r{number}"]
        assert stream.tokens == expected_tokens(tokens, params, len(tokens))
        assert stream.items[0].prefill_worker == "p"
        assert len(stream.items[0].tokens) == 1
    assert num_extra(fleet, "p") > 0
    assert sum(chunk.last for chunk in posted(fleet, "p", PushChunk)) == 6
    assert_clean(fleet)


def test_a_decode_has_room_for_all_tokens_that_a_step_may_give_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = make_fleet()
    runner = fleet["a"].runner
    execute, rooms = runner.execute, []

    def spy(batch: Batch) -> list[SampledTokens | None]:
        (item,) = batch.items
        if item.start >= 30:
            rooms.append((item.start, 8 * len(item.block_table)))
        return execute(batch)

    monkeypatch.setattr(runner, "execute", spy)
    fields, _ = greedy(max_tokens=20)
    fleet["a"].submit("r", prompt(30), params=fields)
    fleet.settle()
    assert rooms
    for start, room in rooms:
        assert room >= min(start + NUM_TOKENS, 30 + 20 - 1)


def test_a_sequence_that_fills_the_cache_alone_still_ends() -> None:
    fleet = make_fleet(model="mock://tiny?blocks=8&max_len=64")
    fields, params = greedy(max_tokens=34)
    fleet["a"].submit("r", prompt(30), params=fields)
    fleet.settle()
    assert fleet["a"].streams["r"].tokens == expected_tokens(prompt(30), params, 30)
    assert fleet["a"].stats().counters.get("preemptions_total", 0) == 0
    assert_clean(fleet)


def test_decode_tokens_are_counted_one_by_one() -> None:
    fleet = make_fleet()
    fields, _ = greedy(max_tokens=30)
    fleet["a"].submit("r", prompt(30), params=fields)
    fleet.settle()
    counted = fleet["a"].stats().counters
    assert counted["decode_tokens_total"] == counted["steps_total"] - 1 + num_extra(fleet)


def test_no_step_is_planned_ahead_of_an_unknown_number_of_tokens() -> None:
    fleet = make_fleet(late=True)
    fields, params = greedy(max_tokens=30)
    fleet["a"].submit("r", prompt(30), params=fields)
    fleet.settle()
    assert fleet["a"].streams["r"].tokens == expected_tokens(prompt(30), params, 30)
    runner = fleet["a"].runner
    assert isinstance(runner, LateRunner)
    assert runner.num_ahead == 0
