"""The core's loop over mock runners: tokens, hand-off, ends."""

from itertools import pairwise

import pytest

from tandem_engine.frames import RouterGone, SetMode
from tandem_engine.handoff.events import FetchRequest, PushChunk
from tandem_engine.tests.fleet import Fleet, assert_clean, ends, expected_tokens, posted, prompt
from tandem_wire.messages import Cancel, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def test_one_request_is_prefilled_and_decoded() -> None:
    fleet = Fleet("a")
    fleet["a"].submit("r", prompt(100))
    fleet.settle()
    stream = fleet["a"].streams["r"]
    assert stream.ends == ["length"]
    assert stream.tokens == expected_tokens(prompt(100), GREEDY, 100)
    ledger = fleet["a"].stats().ledger
    assert ledger["owned"] == ledger["leased"] == ledger["leaked"] == 0


def test_long_prompt_is_fetched_from_a_prefill_worker() -> None:
    fleet = Fleet("d", "p")
    fleet["d"].submit("r", prompt(100), peers=("p",))
    fleet.settle()
    stream = fleet["d"].streams["r"]
    assert stream.tokens == expected_tokens(prompt(100), GREEDY, 100)
    assert stream.items[0].prefill_worker == "p"
    assert stream.items[0].kv_bytes == 13 * fleet["d"].runner.kv.layout.block_bytes
    for name in "dp":
        ledger = fleet[name].stats().ledger
        assert ledger["owned"] == ledger["leased"] == ledger["leaked"] == 0


# --- prefix reuse ---


def test_a_shared_prefix_is_computed_once() -> None:
    fleet = Fleet("a")
    fleet["a"].submit("first", prompt(100))
    fleet.settle()
    fleet["a"].submit("second", prompt(100))
    fleet["a"].submit("longer", prompt(140))
    fleet["a"].submit("salted", prompt(100), cache_salt="tenant")
    fleet.settle()
    streams = fleet["a"].streams
    assert streams["first"].items[0].num_cached_tokens == 0
    assert streams["second"].items[0].num_cached_tokens == 99
    assert streams["longer"].items[0].num_cached_tokens == 100  # generated tokens differ
    assert streams["salted"].items[0].num_cached_tokens == 0
    assert streams["second"].tokens == streams["first"].tokens == streams["salted"].tokens
    counters = fleet["a"].stats().counters
    assert counters["prefix_query_tokens_total"] == 440
    assert counters["prefix_hit_tokens_total"] == 99 + 100
    assert_clean(fleet)


def test_cached_blocks_are_skipped_in_a_fetch_and_pushed_by_the_prefill_worker() -> None:
    fleet = Fleet("d", "p")
    fleet["d"].submit("short", prompt(20))
    fleet["p"].submit("warm", prompt(60))
    fleet.settle()
    fleet["d"].submit("r", prompt(100), peers=("p",))
    fleet.settle()
    (fetch,) = posted(fleet, "d", FetchRequest)
    assert fetch.num_skip_tokens == 16  # two full pages; the third differs
    chunks = posted(fleet, "p", PushChunk)
    assert (chunks[0].start, chunks[0].end) == (16, 56)  # what was cached goes first
    assert chunks[-1].last
    assert chunks[-1].end == 100
    assert all(left.end == right.start for left, right in pairwise(chunks))
    stream = fleet["d"].streams["r"]
    assert stream.items[0].num_cached_tokens >= 56
    assert stream.tokens == expected_tokens(prompt(100), GREEDY, 100)
    assert_clean(fleet)


def test_long_prompts_are_pushed_chunk_by_chunk() -> None:
    fleet = Fleet("d", "p")
    fleet["d"].submit("r", prompt(200), peers=("p",))
    fleet.settle()
    chunks = posted(fleet, "p", PushChunk)
    assert [(chunk.start, chunk.end) for chunk in chunks] == [
        (0, 32),
        (32, 64),
        (64, 96),
        (96, 128),
        (128, 160),
        (160, 192),
        (192, 200),
    ]
    assert [chunk.last for chunk in chunks] == [False] * 6 + [True]


# --- where prefill happens ---


def test_short_suffixes_stay_here() -> None:
    fleet = Fleet("d", "p")
    fleet["d"].submit("short", prompt(16), peers=("p",))
    fleet["d"].submit("alone", prompt(90, start=5))
    fleet.settle()
    assert not posted(fleet, "d", FetchRequest)
    assert_clean(fleet)


def test_zero_local_prefill_tokens_sends_everything_away() -> None:
    fleet = Fleet("d", "p", local_prefill_tokens=0)
    fleet["d"].submit("r", [65], peers=("p",))
    fleet.settle()
    assert fleet["d"].streams["r"].items[0].prefill_worker == "p"


def test_failed_fetch_falls_back_to_local_prefill() -> None:
    fleet = Fleet("d")
    fleet["d"].submit("r", prompt(100), peers=("gone",))
    fleet.settle()
    stream = fleet["d"].streams["r"]
    assert stream.ends == ["length"]
    assert stream.items[0].prefill_worker == ""
    assert stream.tokens == expected_tokens(prompt(100), GREEDY, 100)
    assert fleet["d"].stats().counters["transfer_failures_total"] == 1


def test_next_prefill_worker_is_asked_when_the_first_drains() -> None:
    fleet = Fleet("d", "p", "q")
    fleet["p"].core.post(SetMode(draining=True))
    fleet.settle()
    fleet["d"].submit("r", prompt(100), peers=("p", "q"))
    fleet.settle()
    assert fleet["d"].streams["r"].items[0].prefill_worker == "q"


def test_workers_that_prefill_for_each_other_do_not_wait_forever() -> None:
    fleet = Fleet("a", "b", model="mock://tiny?blocks=16&max_len=128")
    fleet["a"].submit("ra", prompt(100), peers=("b",))
    fleet["b"].submit("rb", prompt(100, start=9), peers=("a",))
    fleet.settle()
    assert ends(fleet, "a") == {"ra": "length"}
    assert ends(fleet, "b") == {"rb": "length"}
    assert_clean(fleet)


# --- the end of a request ---


@pytest.mark.parametrize("steps", range(1, 9))
def test_cancel_in_any_state_gives_everything_back(steps: int) -> None:
    fleet = Fleet("d", "p")
    fleet["d"].submit("fetched", prompt(200), peers=("p",))
    fleet["d"].submit("local", prompt(150, start=3))
    for _ in range(steps):
        fleet.step()
    fleet["d"].core.post(Cancel("fetched"))
    fleet["d"].core.post(Cancel("local"))
    fleet["d"].core.post(Cancel("unknown"))
    fleet.settle()
    assert all(end in ("cancelled", "length") for end in ends(fleet, "d").values())
    assert set(ends(fleet, "d")) == {"fetched", "local"}
    assert_clean(fleet)


def test_cancelled_fetch_keeps_its_blocks_until_it_is_fenced() -> None:
    fleet = Fleet("d", "p")
    fleet["d"].submit("r", prompt(100), peers=("p",))
    fleet["d"].step()
    fleet["d"].core._take(Cancel("r"), 0.0)
    transfers = fleet["d"].core.scheduler.transfers
    assert (transfers.num_fetching, transfers.num_open) == (0, 1)
    assert fleet["d"].stats().ledger["leased"] == 13
    fleet["d"].submit("r", prompt(20))  # the name is still taken
    fleet["d"].core._take(fleet["d"].core._inbox.popleft(), 0.0)
    (refused,) = fleet["d"].core.scheduler.outbox.take_refused()
    assert refused.refused.code == "invalid"
    fleet.settle()
    assert fleet["d"].streams["r"].ends == ["cancelled"]
    assert_clean(fleet)


def test_router_gone_ends_its_requests_silently() -> None:
    fleet = Fleet("a")
    fleet["a"].submit("mine", prompt(50), router=1)
    fleet["a"].submit("other", prompt(50, start=4), router=2)
    fleet.step()
    fleet["a"].core.post(RouterGone(1))
    fleet.settle()
    assert ends(fleet, "a") == {"other": "length"}
    assert_clean(fleet)


def test_stop_tokens_min_tokens_and_eos() -> None:
    fleet = Fleet("a", model="mock://tiny?blocks=64&eos=1")
    submit = fleet["a"].submit
    submit("eos", prompt(10), params={"max_tokens": 9})
    submit("later", prompt(10), params={"max_tokens": 9, "min_tokens": 4})
    submit("ignored", prompt(10), params={"max_tokens": 9, "ignore_eos": True})
    fleet.settle()
    streams = fleet["a"].streams
    assert ends(fleet, "a") == {"eos": "stop", "later": "stop", "ignored": "length"}
    assert [len(streams[rid].tokens) for rid in ("eos", "later", "ignored")] == [1, 5, 9]
    stop = streams["ignored"].tokens[3]
    before = streams["ignored"].tokens.index(stop)
    submit(
        "stop", prompt(10), params={"max_tokens": 9, "ignore_eos": True, "stop_token_ids": [stop]}
    )
    fleet.settle()
    assert streams["stop"].ends == ["stop"]
    assert streams["stop"].tokens == streams["ignored"].tokens[: before + 1]


def test_resumed_request_continues_where_it_was() -> None:
    fleet = Fleet("a", "b")
    fleet["a"].submit("whole", prompt(40), params={"max_tokens": 20, "temperature": 1.0, "seed": 5})
    fleet.settle()
    whole = fleet["a"].streams["whole"].tokens
    fleet["b"].submit(
        "rest",
        [*prompt(40), *whole[:12]],
        num_prompt_tokens=40,
        params={"max_tokens": 20, "temperature": 1.0, "seed": 5},
    )
    fleet["b"].submit(
        "nothing", [*prompt(40), *whole], num_prompt_tokens=40, params={"max_tokens": 20}
    )
    fleet.settle()
    assert fleet["b"].streams["rest"].tokens == whole[12:]
    assert fleet["b"].streams["nothing"].tokens == []
    assert fleet["b"].streams["nothing"].ends == ["length"]


def test_deadline_ends_what_has_no_token_yet() -> None:
    fleet = Fleet("a", max_running=1)
    fleet["a"].submit("runs", prompt(20), params={"max_tokens": 60}, deadline_seconds=0.2)
    fleet["a"].submit("waits", prompt(20), deadline_seconds=0.2)
    fleet.settle()
    assert ends(fleet, "a") == {"runs": "length", "waits": "error"}
    assert "deadline" in fleet["a"].streams["waits"].items[0].error
