"""Workers refuse, die, move and come back; the client sees a pause."""

import asyncio
from functools import partial
from typing import Any

import pytest

from tandem_router.discovery.source import parse_address
from tandem_router.dispatch.sequence import Sequence
from tandem_router.tests.fake_worker import FakeWorker
from tandem_router.tests.harness import Running, router, text_of, until
from tandem_router.workers.link import WorkerLink
from tandem_wire.messages import RefusalCode, Refused

BODY = {"model": "mock", "prompt": "tell me", "max_tokens": 40, "seed": 7}


async def reference() -> str:
    async with router(FakeWorker()) as running:
        return text_of(await running.events("/v1/completions", **BODY))


def begin(running: Running, **extra: Any) -> "asyncio.Task[list[dict[str, Any]]]":
    return asyncio.create_task(running.events("/v1/completions", **BODY, **extra))


def _has_submits(worker: FakeWorker, count: int) -> bool:
    return len(worker.submits) >= count


def owner(*workers: FakeWorker) -> FakeWorker:
    return next(worker for worker in workers if worker.submits)


async def test_a_dead_decode_worker_is_only_a_pause() -> None:
    expected = await reference()
    first, second = FakeWorker("a"), FakeWorker("b")
    first.hold_after = second.hold_after = 15
    async with router(first, second) as running:
        request = begin(running, stream_options={"include_usage": True})
        await until(lambda: first.submits or second.submits)
        dying = owner(first, second)
        other = second if dying is first else first
        links = running.context.fleet.links
        await until(lambda: any(_output(link) == 15 for link in links))
        other.hold_after = None
        await dying.die()
        events = await request
        assert text_of(events) == expected
        assert events[-1]["tandem"]["failovers"] == 1
        assert events[-1]["usage"]["completion_tokens"] == 40
        again = other.submits[0]
        assert len(again.tokens) - again.num_prompt_tokens == 15
        assert again.params.max_tokens == 40
        assert again.rid != dying.submits[0].rid
        assert again.params.seed == dying.submits[0].params.seed
        text = (await running.monitor.get("/metrics")).text
        assert 'tandem_failovers_total{model="mock",stage="decode"} 1.0' in text


def _output(link: WorkerLink) -> int:
    running = [attempt for attempt in link.running.values() if isinstance(attempt, Sequence)]
    return max((len(sequence.output) for sequence in running), default=0)


async def test_the_only_worker_comes_back() -> None:
    expected = await reference()
    worker = FakeWorker()
    worker.hold_after = 10
    async with router(worker) as running:
        request = begin(running)
        await until(lambda: _output(running.context.fleet.links[0]) == 10)
        await worker.die()
        await until(lambda: not running.context.fleet.links[0].is_connected)
        await until(lambda: running.context.dispatcher.num_waiting == 1)
        worker.hold_after = None
        await worker.start()
        assert text_of(await request) == expected


async def test_a_moved_request_goes_on_elsewhere() -> None:
    expected = await reference()
    first, second = FakeWorker("a"), FakeWorker("b")
    first.finish_at = second.finish_at = (9, "moved")
    async with router(first, second) as running:
        request = begin(running)
        await until(lambda: first.submits or second.submits)
        first.finish_at = second.finish_at = None
        for worker in (first, second):
            worker.finish_at = (9, "moved") if not worker.submits else None
        assert text_of(await request) == expected


async def test_a_stream_goes_on_in_its_own_revision_while_there_is_one() -> None:
    expected = await reference()
    old, older, new = FakeWorker("a"), FakeWorker("b"), FakeWorker("c", compatibility_hash="new")
    old.hold_after = older.hold_after = 8
    async with router(old, older) as running:
        request = begin(running)
        await until(lambda: any(_output(link) == 8 for link in running.context.fleet.links))
        await new.start()
        addresses = [parse_address(worker.address) for worker in (old, older, new)]
        running.context.fleet.update(addresses)
        await until(lambda: sum(link.is_connected for link in running.context.fleet.links) == 3)
        first = owner(old, older)
        second = older if first is old else old
        await first.die()
        await until(lambda: second.submits)
        assert not new.submits
        second.hold_after = 12
        await second.die()
        assert text_of(await request) == expected
        assert len(new.submits[0].tokens) - new.submits[0].num_prompt_tokens == 8
    await new.die()


async def test_errors_of_a_worker_are_tried_elsewhere_then_told() -> None:
    worker = FakeWorker()
    worker.finish_at = (2, "error")
    async with router(worker) as running:
        answer = await running.post("/v1/completions", **BODY)
        assert answer.status_code == 500
        assert "out of luck" in answer.json()["error"]["message"]
        assert len(worker.submits) == 3
        events = await running.events("/v1/completions", **BODY)
        assert events[-1]["error"]["code"] in ("generation_failed", "overloaded", "no_worker")


@pytest.mark.parametrize("code", ["no_room", "draining", "internal"])
async def test_a_refusal_goes_to_the_next_worker(code: RefusalCode) -> None:
    expected = await reference()
    first, second = FakeWorker("a"), FakeWorker("b")
    first.refusal = Refused("", code, "not me")
    async with router(first, second, policy="RoundRobin") as running:
        for _ in range(4):
            assert text_of(await running.events("/v1/completions", **BODY)) == expected


async def test_a_full_worker_is_asked_again() -> None:
    worker = FakeWorker()
    worker.refusal = Refused("", "no_room", "full", retry_after_seconds=0.1)
    async with router(worker) as running:
        request = begin(running)
        await until(lambda: len(worker.submits) >= 2)
        worker.refusal = None
        assert len(text_of(await request)) == 40


async def test_a_draining_worker_gets_nothing_new() -> None:
    first, second = FakeWorker("a"), FakeWorker("b")
    first.draining = True
    async with router(first, second) as running:
        await until(lambda: any(link.is_draining for link in running.context.fleet.links))
        for _ in range(6):
            await running.post("/v1/completions", **BODY)
        assert first.submits == []
        first.draining, second.draining = False, True
        first.tell_state()
        second.tell_state()
        await until(
            lambda: [link.is_draining for link in running.context.fleet.links] == [False, True]
        )
        await running.post("/v1/completions", **BODY)
        assert len(first.submits) == 1


async def test_prefill_workers_are_listed_by_queue_and_group() -> None:
    decode = FakeWorker("d", role="decode")
    busy, idle = FakeWorker("p1", role="prefill"), FakeWorker("p2", role="prefill")
    stranger = FakeWorker("p3", role="prefill", compatibility_hash="other")
    async with router(decode, busy, idle, stranger) as running:
        busy.tell_state(queued_prompt_seconds=5.0)
        links = {link.worker_id: link for link in running.context.fleet.links}
        await until(lambda: links["p1"].state and links["p1"].state.queued_prompt_seconds == 5.0)
        answer = (await running.post("/v1/completions", **BODY)).json()
        submit = decode.submits[0]
        assert [peer.worker_id for peer in submit.prefill] == ["p2", "p1"]
        assert submit.prefill[0].port == 8998
        assert answer["tandem"] == {
            "decode_worker": "d",
            "prefill_worker": "p2",
            "kv_bytes": 1024,
            "failovers": 0,
        }


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_cancelled(stream: bool) -> None:
    worker = FakeWorker()
    worker.hold_after = 3
    async with router(worker) as running:

        async def leave() -> None:
            async with running.http.stream(
                "POST", "/v1/completions", json={**BODY, "stream": stream, "n": 2}
            ) as response:
                async for _ in response.aiter_bytes():
                    await asyncio.Event().wait()

        request = asyncio.create_task(leave())
        await until(lambda: _output(running.context.fleet.links[0]) == 3)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await until(lambda: len(worker.cancelled) == 2)
        await until(lambda: running.context.dispatcher.num_inflight == 0)
        assert not running.context.fleet.links[0].running
        text = (await running.monitor.get("/metrics")).text
        assert 'code="499"' in text


async def test_a_client_that_leaves_while_waiting() -> None:
    worker = FakeWorker()
    worker.refusal = Refused("", "no_room", "full")
    async with router(worker) as running:
        request = begin(running)
        await until(lambda: worker.submits)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await until(lambda: running.context.dispatcher.num_inflight == 0)


async def test_drain_finishes_streams_and_refuses_new_ones() -> None:
    worker = FakeWorker()
    worker.hold_after = 5
    async with router(worker) as running:
        dispatcher = running.context.dispatcher
        request = begin(running)
        await until(lambda: _output(running.context.fleet.links[0]) == 5)
        draining = asyncio.create_task(dispatcher.drain(30))
        await until(lambda: dispatcher.draining)
        assert (await running.http.get("/ready")).status_code == 503
        assert (await running.post("/v1/completions", **BODY)).status_code == 503
        assert not draining.done()
        await worker.die()
        worker.hold_after = None
        await worker.start()
        assert len(text_of(await request)) == 40
        assert await draining is True


async def test_a_drain_out_of_time_tells_its_streams() -> None:
    worker = FakeWorker()
    worker.hold_after = 5
    async with router(worker) as running:
        request = begin(running)
        await until(lambda: _output(running.context.fleet.links[0]) == 5)
        assert await running.context.dispatcher.drain(0.01) is False
        assert (await request)[-1]["error"]["code"] == "no_worker"


async def test_giving_up_after_the_failover_time() -> None:
    worker = FakeWorker()
    worker.hold_after = 5
    async with router(worker, failover_seconds=0.1) as running:
        request = begin(running)
        await until(lambda: _output(running.context.fleet.links[0]) == 5)
        await worker.die()
        assert (await request)[-1]["error"]["code"] == "no_worker"


async def test_workers_that_do_not_fit_are_named_not_used() -> None:
    other = FakeWorker("other", model="another-model")
    rude = FakeWorker("rude")
    rude.refuse_hello = Refused("", "unauthorized", "who are you")
    good = FakeWorker("good")
    async with router(other, rude, good, wait=False) as running:
        links = running.context.fleet.links
        await until(lambda: "another-model" in links[0].trouble)
        await until(lambda: "unauthorized" in links[1].trouble)
        await until(lambda: links[2].is_connected)
        await running.post("/v1/completions", **BODY)
        assert len(good.submits) == 1


async def test_a_silent_worker_is_cut_off() -> None:
    expected = await reference()
    silent, lively = FakeWorker("a"), FakeWorker("b")
    silent.hold_after = lively.hold_after = 8
    async with router(silent, lively, heartbeat_seconds=0.1) as running:
        request = begin(running)
        await until(lambda: silent.submits or lively.submits)
        mute = owner(silent, lively)
        other = lively if mute is silent else silent
        await until(lambda: any(_output(link) == 8 for link in running.context.fleet.links))
        mute.answers_pings = False
        other.hold_after = None
        assert text_of(await request) == expected


async def test_many_streams_over_deaths_end_with_the_right_tokens() -> None:
    workers = [FakeWorker(name, step_seconds=0.002) for name in "abc"]
    async with router(*workers) as running:

        async def one(seed: int) -> None:
            body = {**BODY, "seed": seed, "max_tokens": 60}
            events = await running.events("/v1/completions", **body)
            expected = "".join(chr(97 + (seed + 7 + at) % 26) for at in range(60))
            assert text_of(events) == expected

        requests = [asyncio.create_task(one(seed)) for seed in range(40)]
        for worker in workers[:2]:
            await until(partial(_has_submits, worker, 4))
            await worker.die()
            await worker.start()
        await asyncio.gather(*requests)
        assert running.context.dispatcher.num_inflight == 0
