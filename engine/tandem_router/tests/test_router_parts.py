"""Breaker, prefix index, policies, metrics, flags."""

import asyncio
import random

import msgspec
import pytest
from deadlines import patience

from tandem_router.config import RouterConfig, SloClass
from tandem_router.main import (
    build_parser,
    main,
    parse_config,
    parse_slo_classes,
)
from tandem_router.metrics import tail_mean
from tandem_router.policy.base import Placement, queued_seconds
from tandem_router.router import POLICIES
from tandem_router.tests.fake_worker import FakeWorker
from tandem_router.tests.harness import router, until
from tandem_router.workers.breaker import FAILURES_TO_OPEN, CircuitBreaker
from tandem_router.workers.link import WorkerAddress, WorkerLink
from tandem_router.workers.prefix_index import PrefixIndex
from tandem_wire.hashing import prefix_hashes, salt_hash
from tandem_wire.messages import KvEvents, Refused, Welcome, WorkerState


def test_a_circuit_opens_and_closes_by_trial() -> None:
    breaker = CircuitBreaker()
    for at in range(FAILURES_TO_OPEN - 1):
        breaker.on_failure(float(at))
    assert breaker.allows(2.0, 0.0)
    breaker.on_success()
    for _ in range(FAILURES_TO_OPEN):
        breaker.on_failure(10.0)
    assert breaker.is_open
    assert not breaker.allows(11.0, 11.0)
    assert not breaker.allows(13.0, 9.0), "no heartbeat was answered since"
    assert breaker.allows(13.0, 12.9)
    breaker.on_submit()
    assert not breaker.allows(13.0, 12.9), "one trial at a time"
    breaker.on_abandoned()
    assert breaker.allows(13.0, 12.9)
    breaker.on_submit()
    breaker.on_failure(13.0)
    assert not breaker.allows(16.9, 16.9), "a failed trial doubles the time"
    assert breaker.allows(17.1, 17.0)
    breaker.on_submit()
    breaker.on_success()
    assert not breaker.is_open


def test_old_failures_are_forgotten() -> None:
    breaker = CircuitBreaker()
    for at in range(10):
        breaker.on_failure(at * 20.0)
    assert not breaker.is_open


def test_the_prefix_index_follows_events() -> None:
    index = PrefixIndex()
    index.apply(KvEvents(5, stored=[1, 2, 3, 4]))
    assert index.num_matching_blocks([1, 2, 9, 3]) == 2
    index.apply(KvEvents(6, removed=[2]))
    assert index.num_matching_blocks([1, 2]) == 1
    index.apply(KvEvents(8, stored=[7]))  # 7 was missed
    assert len(index) == 1
    index.apply(KvEvents(9, stored=[8], cleared=True))
    assert index.num_matching_blocks([8]) == 1
    index.clear()
    assert len(index) == 0


def link(name: str, **state: float) -> WorkerLink:
    made = WorkerLink(
        WorkerAddress(name, "127.0.0.1", 1),
        router_id="r",
        model_name="mock",
        heartbeat_seconds=1.0,
        on_change=lambda: None,
    )
    made.welcome = Welcome(
        worker_id=name,
        boot_id="b",
        role="both",
        model="mock",
        compatibility_hash="c",
        max_model_len=100,
        page_size=4,
        num_blocks=100,
        vocab_size=512,
        eos_token_ids=[1],
        bootstrap_host="",
        bootstrap_port=0,
        salt_parts=["mock"],
    )
    empty = WorkerState(role="both", num_blocks=100, num_free_blocks=100)
    made.state = msgspec.structs.replace(empty, **state)
    return made


async def test_least_loaded() -> None:
    random.seed(0)
    policy = POLICIES["LeastLoaded"]()
    busy, idle = link("a", num_running=3), link("b", num_running=1, num_waiting=1)
    assert policy.choose_decode([busy, idle], Placement([1])) is idle
    idle.num_submitted_since_state = 2
    assert policy.choose_decode([busy, idle], Placement([1])) is busy
    full = link("c", num_free_blocks=1)
    assert policy.choose_decode([busy, full], Placement([1] * 50)) is busy
    even = [link("a"), link("b")]
    assert {policy.choose_decode(even, Placement([1])) for _ in range(50)} == set(even)


async def test_prefill_order() -> None:
    policy = POLICIES["LeastLoaded"]()
    slow = link("a", queued_prompt_seconds=2.0)
    quick = link("b", queued_prompt_seconds=1.0, prefill_tokens_per_second=100.0)
    assert policy.order_prefill([slow, quick]) == [quick, slow]
    quick.num_prompt_tokens_since_state = 200
    assert queued_seconds(quick) == 3.0
    assert policy.order_prefill([slow, quick]) == [slow, quick]


async def test_round_robin() -> None:
    policy = POLICIES["RoundRobin"]()
    links = [link("b"), link("a")]
    chosen = [policy.choose_decode(links, Placement([1])).address.name for _ in range(4)]
    assert chosen == ["a", "b", "a", "b"]
    orders = [[peer.address.name for peer in policy.order_prefill(links)] for _ in range(2)]
    assert orders == [["a", "b"], ["b", "a"]]
    assert policy.order_prefill([]) == []


async def test_kv_aware_prefers_the_longest_prefix_of_comparable_workers() -> None:
    policy = POLICIES["KvAware"]()
    tokens = list(range(20))
    hashes = prefix_hashes(tokens, 4, salt_hash("mock", "tenant"))
    cold, warm, hot = link("a"), link("b", num_running=2), link("c", num_running=50)
    warm.prefixes.apply(KvEvents(0, stored=hashes[:3]))
    hot.prefixes.apply(KvEvents(0, stored=hashes))
    links = [cold, warm, hot]
    assert policy.choose_decode(links, Placement(tokens, "tenant")) is warm
    assert policy.choose_decode(links, Placement(tokens, "stranger")) is cold
    full = link("d", num_free_blocks=0)
    full.prefixes.apply(KvEvents(0, stored=hashes))
    assert policy.choose_decode([cold, full], Placement(tokens, "tenant")) is cold
    assert policy.choose_decode([full], Placement(tokens, "tenant")) is full


async def test_kv_events_reach_the_index() -> None:
    worker = FakeWorker()
    async with router(worker, policy="KvAware") as running:
        worker.tell(KvEvents(0, stored=[1, 2]))
        (only,) = running.context.fleet.links
        await until(lambda: len(only.prefixes) == 2)
        answer = await running.post("/v1/completions", model="mock", prompt="x" * 64, max_tokens=2)
        assert answer.status_code == 200


async def test_a_failing_worker_is_avoided_until_it_has_answered_again() -> None:
    bad, good = FakeWorker("bad"), FakeWorker("good")
    bad.refusal = Refused("", "internal", "broken")
    async with router(bad, good, policy="RoundRobin", heartbeat_seconds=0.05) as running:
        body = {"model": "mock", "prompt": "x", "max_tokens": 2}
        links = {link.worker_id: link for link in running.context.fleet.links}

        async def until_open() -> None:
            while not links["bad"].breaker.is_open:
                assert (await running.post("/v1/completions", **body)).status_code == 200
                await asyncio.sleep(0.05)

        await asyncio.wait_for(until_open(), patience(20))
        num = len(bad.submits)
        await running.post("/v1/completions", **body)
        await running.post("/v1/completions", **body)
        assert len(bad.submits) == num
        bad.refusal = None

        async def until_closed() -> None:
            while links["bad"].breaker.is_open:
                assert (await running.post("/v1/completions", **body)).status_code == 200
                await asyncio.sleep(0.05)

        await asyncio.wait_for(until_closed(), patience(20))


def test_tail_mean() -> None:
    assert tail_mean([1.0]) == 1.0
    assert tail_mean([*range(20)]) == 18.5


def test_slo_classes() -> None:
    classes = parse_slo_classes(
        '[{"name": "a", "default": true, "ttftMilliseconds": 1500}, {"name": "b"}]'
    )
    assert classes[0] == SloClass(name="a", default=True, ttft_seconds=1.5)
    config = RouterConfig(model_name="m", model="mock://x", slo_classes=classes)
    assert config.slo_class(None) is classes[0]
    assert config.slo_class("b") is classes[1]
    assert config.slo_class("c") is None
    for bad in ("{", '[{"nam": "a"}]', '[{"name":"a","default":true},{"name":"b","default":true}]'):
        with pytest.raises(ValueError, match="--slo-classes"):
            parse_slo_classes(bad)


def test_flags() -> None:
    parser = build_parser()
    config = parse_config(
        parser.parse_args(["--model", "mock://tiny", "--worker", "a:1", "--worker", "b:2"])
    )
    assert config.model_name == "tiny"
    assert config.workers == ("a:1", "b:2")
    for wrong in (
        ["--model", "mock://tiny"],
        ["--model", "mock://tiny", "--worker", "a:1", "--service", "s"],
        ["--model", "mock://tiny", "--worker", "a"],
    ):
        with pytest.raises(ValueError, match=r"--worker|HOST:PORT"):
            parse_config(parser.parse_args(wrong))


def test_a_bad_start_ends_with_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--model", "mock://tiny"])
    assert stopped.value.code == 2
    assert "--service" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--model", "file:///nowhere", "--worker", "127.0.0.1:1"])
    assert stopped.value.code == 1
    assert "doesn't exist" in capsys.readouterr().err
