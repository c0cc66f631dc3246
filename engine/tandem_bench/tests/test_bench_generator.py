"""The generator against an endpoint that behaves, breaks, refuses and hangs."""

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest
from deadlines import patience

from tandem_bench.errors import EndpointError, WorkloadError
from tandem_bench.report.document import Report
from tandem_bench.report.summary import Summary
from tandem_bench.serve.campaign import Campaign, measure
from tandem_bench.serve.endpoint import Endpoint, base_url
from tandem_bench.serve.events import EventParser
from tandem_bench.serve.generator import Counters, LoadGenerator, LoadSettings
from tandem_bench.tests.scripted_endpoint import (
    Answer,
    Exchange,
    ScriptedEndpoint,
    breaks,
    fails_inside,
    hangs,
    says_nothing,
    status,
    talks_nonsense,
    whole,
)
from tandem_bench.workload.prompts import PromptMaker
from tandem_bench.workload.random_lengths import RandomLengths, plan_random

FAST = RandomLengths(input_range=(5, 9), output_range=(4, 4))


def quiet(_number: int, _label: str, _total: int) -> Callable[[Counters], None]:
    return lambda _: None


async def run(endpoint: ScriptedEndpoint, **changes: Any) -> Report:
    load = LoadSettings(
        num_requests=changes.pop("num_requests", 12), concurrency=changes.pop("concurrency", 0)
    )
    rates = changes.pop("rates", (None,) if load.concurrency else (400.0,))
    campaign = Campaign(url=endpoint.url, lengths=FAST, load=load, rates=rates, **changes)
    campaign.check()
    return await measure(campaign, None, quiet, lambda _: None, "test")


async def summary_of(endpoint: ScriptedEndpoint, **changes: Any) -> Summary:
    return (await run(endpoint, **changes)).runs[0].summary


async def test_every_answer_is_measured() -> None:
    async with ScriptedEndpoint().serving() as endpoint:
        found = await summary_of(endpoint)
    assert (found.sent, found.completed, found.failed) == (12, 12, 0)
    assert found.output_tokens == 48
    assert found.pieces == 48
    assert found.tbt.count == 36
    assert found.input_tokens == sum(len(body["prompt"]) for body in endpoint.bodies)
    assert all(isinstance(body["prompt"], list) for body in endpoint.bodies)
    assert all(body["stream_options"] == {"include_usage": True} for body in endpoint.bodies)


BROKEN: list[tuple[Answer, str]] = [
    (status(429), "HTTP 429"),
    (status(500), "HTTP 500"),
    (breaks, "broken stream"),
    (fails_inside, "error event"),
    (talks_nonsense, "malformed event"),
    (says_nothing, "no tokens"),
    (hangs, "timeout"),
]


async def test_failures_are_counted_by_kind_and_never_hang() -> None:
    def script(number: int) -> Answer:
        return BROKEN[number][0] if number < len(BROKEN) else whole

    async with ScriptedEndpoint(script).serving() as endpoint:
        found = await summary_of(endpoint, request_timeout=1.0)
    assert {failure.kind for failure in found.failures} == {kind for _, kind in BROKEN}
    assert all(failure.count == 1 for failure in found.failures)
    assert (found.completed, found.failed) == (5, 7)
    assert found.output_tokens == 20


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    everything_sent = asyncio.Event()

    async def last_releases_all(exchange: Exchange) -> None:
        if exchange.number == 29:
            everything_sent.set()
        await everything_sent.wait()
        await whole(exchange)

    async with ScriptedEndpoint(lambda _: last_releases_all).serving() as endpoint:
        found = await summary_of(endpoint, num_requests=30)
    assert found.completed == 30
    assert found.peak_in_flight == 30


async def test_a_closed_loop_keeps_so_many_under_way() -> None:
    async with ScriptedEndpoint().serving() as endpoint:
        found = await summary_of(endpoint, num_requests=20, concurrency=3)
    assert found.completed == 20
    assert endpoint.most_open == 3
    assert found.peak_in_flight == 3


@pytest.mark.parametrize("concurrency", [0, 2])
async def test_stopping_ends_a_run_whatever_hangs(concurrency: int) -> None:
    load = LoadSettings(concurrency=concurrency, num_requests=5)

    async with (
        ScriptedEndpoint(lambda _: hangs).serving() as endpoint,
        Endpoint.open(endpoint.url, "given") as target,
    ):
        generator = LoadGenerator(target, PromptMaker("ids", 500, 0), load)
        running = asyncio.create_task(generator.run(plan_random(FAST, None, 0)))
        deadline = asyncio.get_running_loop().time() + patience(20)
        while endpoint.open_now < (concurrency or 5):
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)
        generator.stop()
        result = await asyncio.wait_for(running, patience(20))
    assert result.interrupted
    assert {record.error for record in result.records} == {"interrupted"}


async def test_all_at_once() -> None:
    async with ScriptedEndpoint().serving() as endpoint:
        found = await summary_of(endpoint, rates=(math.inf,))
    assert found.completed == 12
    assert found.label == "all at once"


async def test_a_sweep_has_a_run_for_every_rate_and_other_prompts() -> None:
    async with ScriptedEndpoint().serving() as endpoint:
        report = await run(endpoint, rates=(200.0, 800.0), num_requests=5)
    assert [each.summary.label for each in report.runs] == ["200 req/s", "800 req/s"]
    assert len({tuple(body["prompt"]) for body in endpoint.bodies}) == 10
    assert [len(each.requests) for each in report.runs] == [5, 5]


async def test_a_smaller_vocabulary_is_found() -> None:
    async with ScriptedEndpoint(vocab_size=512).serving() as endpoint:
        await run(endpoint)
    assert max(max(body["prompt"]) for body in endpoint.bodies) < 512


async def test_text_where_no_ids_are_taken() -> None:
    async with ScriptedEndpoint(vocab_size=0).serving() as endpoint:
        await run(endpoint)
        assert all(isinstance(body["prompt"], str) for body in endpoint.bodies)
        with pytest.raises(WorkloadError, match="takes no token ids"):
            await run(endpoint, prompt_kind="ids")


async def test_nobody_there_is_told_with_a_remedy() -> None:
    with pytest.raises(EndpointError, match="can't be reached") as caught:
        await run(ScriptedEndpoint(url="http://127.0.0.1:9"))
    assert "tandem serve" in caught.value.remedy


async def test_lost_endpoints_are_failures_not_exceptions() -> None:
    async with ScriptedEndpoint().serving() as endpoint:
        pass
    found = await summary_of(
        ScriptedEndpoint(url=endpoint.url), model="given", prompt_kind="text", num_requests=3
    )
    assert found.failed == 3
    assert found.failures[0].kind == "no connection"


@pytest.mark.parametrize(
    "campaign",
    [
        Campaign(url="x", rates=(1.0,)),
        Campaign(url="x", load=LoadSettings(num_requests=3)),
        Campaign(url="x", rates=(1.0,), load=LoadSettings(num_requests=3, concurrency=2)),
        Campaign(url="x", rates=(math.inf,), load=LoadSettings(duration=3)),
    ],
)
def test_what_would_never_end_or_begin_is_refused(campaign: Campaign) -> None:
    with pytest.raises(WorkloadError):
        campaign.check()


@pytest.mark.parametrize(
    "given", ["127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1/"]
)
def test_urls_are_taken_as_people_write_them(given: str) -> None:
    assert base_url(given) == "http://127.0.0.1:8000"


STREAM = (
    b": ping\n\ndata: one\n\nevent: x\ndata: two\ndata: three\n\ndata:four\r\n\r\ndata: five\n\n"
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_arrive_in_pieces_of_any_size(size: int) -> None:
    parser = EventParser()
    found = [
        event for at in range(0, len(STREAM), size) for event in parser.feed(STREAM[at : at + size])
    ]
    assert found == [b"one", b"two\nthree", b"four", b"five"]
