"""The core's loop over mock runners: refusals, order, modes, reports."""

import threading
import time
from typing import Any

import pytest
from deadlines import patience

from tandem_engine.frames import (
    CoreFailed,
    CoreRefused,
    CoreStats,
    CoreStep,
    ProbeRequest,
    ProbeResult,
    SetMode,
    Shutdown,
)
from tandem_engine.handoff.events import PrefillArrived, PrefillDropped, PushChunk, PushFailed
from tandem_engine.step import Batch, SampledTokens
from tandem_engine.tests.fleet import Fleet, assert_clean, ends, expected_tokens, posted, prompt
from tandem_wire.handoff import Prefill
from tandem_wire.messages import Role, SamplingParams

# --- refusals ---


@pytest.mark.parametrize(
    ("tokens", "params", "code"),
    [
        (prompt(300), {"max_tokens": 3}, "too_long"),
        (prompt(100), {"max_tokens": 100}, "too_long"),  # 25 blocks and there are 20
        ([], {}, "invalid"),
        ([5000], {}, "invalid"),
        ([65], {"max_tokens": 0}, "invalid"),
        ([65], {"min_tokens": 9}, "invalid"),
        ([65], {"temperature": -1.0}, "invalid"),
        ([65], {"top_p": 0.0}, "invalid"),
        ([65], {"repetition_penalty": 0.0}, "invalid"),
    ],
)
def test_impossible_requests_are_refused_at_once(
    tokens: list[int], params: dict[str, Any], code: str
) -> None:
    fleet = Fleet("a", model="mock://tiny?blocks=20&max_len=256")
    fleet["a"].submit("r", tokens, params=params)
    fleet["a"].step()
    assert fleet["a"].streams["r"].refused == [code]


def test_full_queue_is_no_room_with_a_time_to_come_back() -> None:
    fleet = Fleet("a", max_running=1, max_waiting=2)
    for number in range(4):
        fleet["a"].submit(f"r{number}", prompt(20, start=number), params={"max_tokens": 50})
    fleet.step()
    refused = [frame for frame in fleet["a"].frames if isinstance(frame, CoreRefused)]
    assert {frame.refused.code for frame in refused} == {"no_room"}
    assert all(frame.refused.retry_after_seconds > 0 for frame in refused)
    fleet.settle()
    assert_clean(fleet)


def test_a_rid_is_used_once_at_a_time() -> None:
    fleet = Fleet("a")
    fleet["a"].submit("r", prompt(20))
    fleet["a"].submit("r", prompt(20), router=2)
    for _ in range(2):
        fleet["a"].core._take(fleet["a"].core._inbox.popleft(), 0.0)
    (refused,) = fleet["a"].core.scheduler.outbox.take_refused()
    assert (refused.router, refused.refused.code) == (2, "invalid")
    fleet.settle()
    assert fleet["a"].streams["r"].ends == ["length"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"blocks": [1]}, "invalid"),
        ({"num_skip_tokens": 3}, "invalid"),
        ({"tokens": prompt(2000), "blocks": list(range(250))}, "too_long"),
        ({"num_prompt_tokens": 0}, "invalid"),
    ],
)
def test_impossible_prefills_are_refused_at_once(changes: dict[str, Any], code: str) -> None:
    fleet = Fleet("p")
    values: dict[str, Any] = {
        "rid": "r",
        "epoch": 1,
        "tokens": prompt(20),
        "num_prompt_tokens": 20,
        "num_skip_tokens": 0,
        "blocks": [0, 1, 2],
        "params": SamplingParams(max_tokens=1),
        **changes,
    }
    fleet["p"].handoff.tell(PrefillArrived("k", Prefill(**values)))
    fleet["p"].step()
    (failed,) = posted(fleet, "p", PushFailed)
    assert failed.code == code


def test_remote_prefills_have_a_bounded_queue_and_unique_keys() -> None:
    fleet = Fleet("p", max_waiting=1, max_batched_tokens=8)
    for key in ("one", "two", "two", "three"):
        prefill = Prefill(
            rid=key,
            epoch=1,
            tokens=prompt(40),
            num_prompt_tokens=40,
            num_skip_tokens=0,
            blocks=list(range(5)),
            params=SamplingParams(max_tokens=1),
        )
        fleet["p"].handoff.tell(PrefillArrived(key, prefill))
        fleet["p"].step()
    assert [event.code for event in posted(fleet, "p", PushFailed)] == ["no_room", "no_room"]
    for key in ("one", "two"):
        fleet["p"].handoff.tell(PrefillDropped(key))
    fleet.settle()
    assert_clean(fleet)


# --- scheduling ---


def test_higher_priority_goes_first_and_may_preempt() -> None:
    fleet = Fleet("a", model="mock://tiny?blocks=16&max_len=128")
    fleet["a"].submit("low", prompt(80), params={"max_tokens": 30})
    fleet["a"].submit("second", prompt(10, start=8), params={"max_tokens": 5})
    for _ in range(4):
        fleet.step()
    fleet["a"].submit("high", prompt(80, start=4), params={"max_tokens": 4}, priority=5)
    fleet.settle()
    streams = fleet["a"].streams
    assert ends(fleet, "a") == {"low": "length", "second": "length", "high": "length"}
    assert list(ends(fleet, "a")) != []
    assert fleet["a"].stats().counters["preemptions_total"] >= 1
    params = SamplingParams(max_tokens=30, temperature=0.0)
    assert streams["low"].tokens == expected_tokens(prompt(80), params, 80)
    order = [
        item.rid
        for frame in fleet["a"].frames
        if isinstance(frame, CoreStep)
        for routed in frame.routed
        for item in routed.items
        if item.finish
    ]
    assert order.index("high") < order.index("low")


def test_decodes_share_a_budget_that_is_too_small_for_all() -> None:
    fleet = Fleet("a", max_batched_tokens=8, max_running=16)
    for number in range(14):
        fleet["a"].submit(f"r{number}", prompt(3, start=number), params={"max_tokens": 20})
    fleet.settle()
    assert len(ends(fleet, "a")) == 14
    assert set(ends(fleet, "a").values()) == {"length"}


def test_a_long_prompt_does_not_stop_the_decodes() -> None:
    fleet = Fleet("a", max_batched_tokens=32)
    fleet["a"].submit("decodes", prompt(8), params={"max_tokens": 40})
    fleet.step()
    fleet["a"].submit("long", prompt(300, start=2))
    before = len(fleet["a"].streams["decodes"].tokens)
    for _ in range(8):
        fleet.step()
    assert len(fleet["a"].streams["decodes"].tokens) == before + 8
    assert "long" not in fleet["a"].streams


@pytest.mark.parametrize(("role", "first"), [("prefill", "remote"), ("decode", "local")])
def test_role_decides_who_goes_first(role: Role, first: str) -> None:
    fleet = Fleet("d", "p")
    fleet["p"].core.post(SetMode(role=role))
    fleet["p"].step()
    assert fleet["p"].stats().state.role == role
    fleet["p"].submit("local", prompt(64, start=1))
    fleet["d"].submit("remote", prompt(64, start=6), peers=("p",))
    fleet["d"].step()
    fleet["p"].step()
    prefilling = fleet["p"].core.scheduler.running.prefilling
    done = "remote" if posted(fleet, "p", PushChunk) else "local"
    assert (done == first) or prefilling


# --- modes ---


def test_draining_refuses_and_finishes() -> None:
    fleet = Fleet("d", "p")
    fleet["d"].submit("runs", prompt(40), params={"max_tokens": 20})
    fleet.step()
    fleet["d"].core.post(SetMode(draining=True))
    fleet["d"].submit("late", prompt(40))
    fleet["d"].step()
    assert fleet["d"].handoff.draining
    assert fleet["d"].streams["late"].refused == ["draining"]
    assert fleet["d"].stats().state.draining
    fleet.settle()
    assert fleet["d"].streams["runs"].ends == ["length"]
    fleet["d"].core.post(SetMode(draining=False))
    fleet["d"].submit("again", prompt(40))
    fleet.settle()
    assert fleet["d"].streams["again"].ends == ["length"]


def test_draining_worker_refuses_prefills_that_slip_through() -> None:
    fleet = Fleet("d", "p")
    fleet["p"].core._set_mode(SetMode(draining=True))
    fleet["p"].handoff.draining = False
    fleet["d"].submit("r", prompt(100), peers=("p",))
    fleet.settle()
    assert [event.code for event in posted(fleet, "p", PushFailed)] == ["draining"]
    assert fleet["d"].streams["r"].ends == ["length"]


def test_moved_streams_go_on_elsewhere() -> None:
    fleet = Fleet("a", "b", "p")
    params = {"max_tokens": 20}
    fleet["a"].submit("runs", prompt(40), params=params)
    fleet["a"].submit("fetches", prompt(200, start=3), peers=("p",), params=params)
    fleet["a"].step()
    fleet["a"].step()
    fleet["a"].core.post(SetMode(draining=True, move_streams=True))
    fleet.settle()
    assert ends(fleet, "a") == {"runs": "moved", "fetches": "moved"}
    streamed = fleet["a"].streams["runs"].tokens
    assert streamed
    fleet["b"].submit("runs2", [*prompt(40), *streamed], num_prompt_tokens=40, params=params)
    fleet.settle()
    whole = expected_tokens(prompt(40), SamplingParams(max_tokens=20, temperature=0.0), 40)
    assert [*streamed, *fleet["b"].streams["runs2"].tokens] == whole
    assert_clean(fleet)


def test_shutdown_gives_everything_back_and_closes() -> None:
    fleet = Fleet("a")
    fleet["a"].submit("r", prompt(40), params={"max_tokens": 20})
    fleet.step()
    fleet["a"].core.post(Shutdown())
    fleet["a"].core.run()
    assert ends(fleet, "a") == {"r": "moved"}
    assert fleet["a"].handoff.closed


def test_failing_step_is_reported_and_raised() -> None:
    fleet = Fleet("a")

    def explode(batch: Batch) -> list[SampledTokens | None]:
        raise RuntimeError(f"the device is gone with {len(batch.items)} items")

    fleet["a"].runner.execute = explode  # type: ignore[method-assign]
    fleet["a"].submit("r", prompt(40))
    with pytest.raises(RuntimeError):
        fleet["a"].core.run()
    failed = fleet["a"].frames[-1]
    assert isinstance(failed, CoreFailed)
    assert "the device is gone" in failed.message
    assert fleet["a"].handoff.closed


def test_idle_core_wakes_for_a_message_from_another_thread() -> None:
    fleet = Fleet("a")
    core = fleet["a"].core
    thread = threading.Thread(target=core.run)
    thread.start()
    fleet["a"].submit("r", prompt(40))
    deadline = time.monotonic() + patience(20)
    while "r" not in ends(fleet, "a") and time.monotonic() < deadline:
        thread.join(0.01)
    core.post(Shutdown())
    thread.join(patience(20))
    assert not thread.is_alive()
    assert ends(fleet, "a") == {"r": "length"}


def test_probe_is_the_hand_offs_work() -> None:
    fleet = Fleet("a")
    fleet["a"].core.post(ProbeRequest(number=3, host="127.0.0.1", port=1, num_blocks=4))
    fleet["a"].step()
    fleet["a"].step()
    (result,) = [frame for frame in fleet["a"].frames if isinstance(frame, ProbeResult)]
    assert result.number == 3


def test_load_report_tells_queues_rates_and_samples() -> None:
    fleet = Fleet("a", max_running=2)
    for number in range(4):
        fleet["a"].submit(f"r{number}", prompt(60, start=number), params={"max_tokens": 9})
    fleet.step()
    stats = fleet["a"].stats()
    assert stats.state.num_waiting == 2
    assert stats.state.queued_prompt_tokens == 120 + 56  # two wait, one has 4 of 60 tokens done
    assert stats.state.num_blocks == 64
    assert stats.gauges["queue_length"] == 2
    assert stats.gauges["kv_usage_ratio"] > 0
    assert stats.counters["requests_total"] == 4
    assert stats.counters["kv_fences_total"] == 1
    samples = [f.observations for f in fleet["a"].frames if isinstance(f, CoreStats)]
    assert sum(len(sample.get("queue_seconds", [])) for sample in samples) == 2
    fleet.settle()
    stats = fleet["a"].stats()
    assert stats.counters["finished_length_total"] == 4
    assert stats.counters["prefill_tokens_total"] >= 60


def test_compatibility_depends_on_model_and_layout_only() -> None:
    fleet = Fleet("a", "b")
    other = Fleet("c", page_size=16)
    slow = Fleet("e", model="mock://tiny?blocks=99&speed=0.5")
    assert fleet["a"].core.compatibility_hash == fleet["b"].core.compatibility_hash
    assert fleet["a"].core.compatibility_hash == slow["e"].core.compatibility_hash
    assert fleet["a"].core.compatibility_hash != other["c"].core.compatibility_hash
    ready = fleet["a"].core.ready(8998)
    assert (ready.page_size, ready.num_blocks, ready.bootstrap_port) == (8, 64, 8998)
