"""Random workloads over three cores: nothing leaks, nothing ends twice, no token is wrong."""

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem_engine.frames import RouterGone, SetMode
from tandem_engine.scheduler.step_times import StepLoad
from tandem_engine.tests.fleet import Fleet, expected_tokens
from tandem_engine.tests.loopback import Network
from tandem_wire.messages import Cancel, SamplingParams

NAMES = ("a", "b", "c")
PREFIXES = [[40 + (i * k) % 50 for i in range(200)] for k in (1, 3, 7)]

request = st.fixed_dictionaries(
    {
        "worker": st.sampled_from(NAMES),
        "prefix": st.integers(0, 2),
        "length": st.integers(1, 150),
        "tail": st.integers(0, 40),
        "streamed": st.integers(0, 6),
        "max_tokens": st.integers(1, 60),
        "min_tokens": st.integers(0, 12),
        "stops": st.lists(st.integers(32, 126), max_size=3),
        "temperature": st.sampled_from([0.0, 1.0]),
        "priority": st.integers(0, 2),
        "router": st.integers(1, 2),
        "peers": st.lists(st.sampled_from([*NAMES, "nobody"]), max_size=3, unique=True),
        "deadline": st.sampled_from([0.0, 0.0, 0.05]),
        "cache_salt": st.sampled_from(["", "tenant"]),
        "ttft": st.sampled_from([0.0, 0.0, 0.03, 1.0]),
        "tbt": st.sampled_from([0.0, 0.0, 0.004, 0.02]),
    }
)
action = st.one_of(
    st.tuples(st.just("submit"), request),
    st.tuples(st.just("submit"), request),
    st.tuples(st.just("step"), st.integers(1, 10)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("gone"), st.integers(1, 2)),
    st.tuples(st.just("role"), st.sampled_from(["prefill", "decode", "both"])),
)


def build_tokens(values: dict[str, Any]) -> tuple[list[int], int]:
    rng = random.Random(values["tail"] * 1000 + values["length"])
    prompt = PREFIXES[values["prefix"]][: values["length"]]
    prompt = prompt + [32 + rng.randrange(95) for _ in range(values["tail"])]
    return prompt, len(prompt)


def run(
    actions: list[Any], *, blocks: int, network: Network, window: int = 0, **runner: Any
) -> Fleet:
    fleet = Fleet(
        *NAMES,
        **runner,
        network=network,
        model=f"mock://tiny?blocks={blocks}&max_len=300&window={window}",
        max_running=6,
        max_waiting=12,
    )
    for worker in fleet.workers.values():
        # The fleet's steps take no time; prompts are cut by this one.
        worker.core.scheduler.budget.times.learn(StepLoad(64, 2048.0, 1, 64), 0.01)
    sent: dict[str, tuple[str, list[int], SamplingParams, int, int]] = {}
    gone: set[str] = set()
    for kind, value in actions:
        if kind == "submit":
            prompt, num_prompt = build_tokens(value)
            fields = {
                "max_tokens": value["max_tokens"],
                "min_tokens": min(value["min_tokens"], value["max_tokens"]),
                "stop_token_ids": value["stops"],
                "temperature": value["temperature"],
                "seed": 7,
            }
            params = SamplingParams(**fields)
            count = min(value["streamed"], params.max_tokens)
            tokens = prompt + expected_tokens(prompt, params, num_prompt)[:count]
            rid = f"r{len(sent)}"
            sent[rid] = value["worker"], tokens, params, num_prompt, value["router"]
            fleet[value["worker"]].submit(
                rid,
                tokens,
                num_prompt_tokens=num_prompt,
                router=value["router"],
                peers=tuple(value["peers"]),
                params=fields,
                priority=value["priority"],
                deadline_seconds=value["deadline"],
                cache_salt=value["cache_salt"],
                ttft_seconds=value.get("ttft", 0.0),
                tbt_seconds=value.get("tbt", 0.0),
            )
        elif kind == "step":
            for _ in range(value):
                fleet.step()
        elif kind == "cancel" and f"r{value}" in sent:
            fleet[sent[f"r{value}"][0]].core.post(Cancel(f"r{value}"))
        elif kind == "gone":
            for worker in fleet.workers.values():
                worker.core.post(RouterGone(value))
            gone.update(rid for rid, (*_, router) in sent.items() if router == value)
        elif kind == "role":
            fleet["b"].core.post(SetMode(role=value))
    fleet.settle()
    check_outcome(fleet, sent, gone)
    return fleet


def check_outcome(fleet: Fleet, sent: dict[str, Any], gone: set[str]) -> None:
    for rid, (name, tokens, params, num_prompt, _) in sent.items():
        stream = fleet[name].streams.get(rid)
        if rid in gone:
            assert stream is None or len(stream.ends) <= 1
        else:
            assert stream is not None
            assert len(stream.ends) == 1, f"{rid} had {stream.ends}"
        if stream is None:
            continue
        expected = expected_tokens(tokens, params, num_prompt)
        if stream.ends and stream.ends[0] in ("stop", "length"):
            assert stream.tokens == expected, rid
            assert stream.ends[0] == expected_end(tokens, expected, params, num_prompt), rid
        else:
            assert stream.tokens == expected[: len(stream.tokens)], rid
    for worker in fleet.workers.values():
        stats = worker.stats()
        assert stats.ledger["owned"] == stats.ledger["leased"] == stats.ledger["leaked"] == 0
        assert stats.state.num_running == stats.state.num_waiting == stats.state.num_leases == 0
        assert not list(worker.core.scheduler.requests)
        stored: set[int] = set()
        for number, event in enumerate(worker.kv_events(), start=1):
            assert event.sequence == number
            assert not stored & set(event.stored)
            assert set(event.removed) <= stored
            stored = (stored | set(event.stored)) - set(event.removed)
        assert stored == set(worker.core.ledger.index.hashes())


def expected_end(
    tokens: list[int], generated: list[int], params: SamplingParams, num_prompt: int
) -> str:
    num_output = len(tokens) - num_prompt + len(generated)
    stopped = generated and generated[-1] in params.stop_token_ids
    return "stop" if stopped and num_output > params.min_tokens else "length"


common = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


all_kinds_of_runner = pytest.mark.parametrize(
    "runner",
    [{}, {"late": True, "window": 20}, {"step_tokens": 4}, {"step_tokens": 4, "late": True}],
    ids=["prompt", "late-window", "several", "several-late"],
)


@all_kinds_of_runner
@common
@given(actions=st.lists(action, min_size=3, max_size=40))
def test_random_workloads_leave_nothing_behind(actions: list[Any], runner: dict[str, Any]) -> None:
    run(actions, blocks=96, network=Network(), **runner)


@all_kinds_of_runner
@common
@given(actions=st.lists(action, min_size=3, max_size=40), seed=st.integers(0, 2**16))
def test_scarce_blocks_and_failing_peers_leave_nothing_behind(
    actions: list[Any], seed: int, runner: dict[str, Any]
) -> None:
    network = Network(rng=random.Random(seed), refuse_share=0.2, drop_share=0.15)
    run(actions, blocks=34, network=network, **runner)


def random_actions(rng: random.Random, count: int) -> list[Any]:
    actions: list[Any] = []
    for _ in range(count):
        kind = rng.choices(["submit", "step", "cancel"], weights=[10, 6, 1])[0]
        if kind == "step":
            actions.append((kind, rng.randint(1, 8)))
        elif kind == "cancel":
            actions.append((kind, rng.randrange(count)))
        else:
            names = list(NAMES)
            rng.shuffle(names)
            values = {
                "worker": names[0],
                "prefix": rng.randrange(3),
                "length": rng.randint(1, 150),
                "tail": rng.randint(0, 40),
                "streamed": rng.randint(0, 6),
                "max_tokens": rng.randint(1, 60),
                "min_tokens": 0,
                "stops": [],
                "temperature": rng.choice([0.0, 1.0]),
                "priority": rng.randint(0, 2),
                "router": 1,
                "peers": names[1 : rng.randint(1, 3)],
                "deadline": 0.0,
                "cache_salt": rng.choice(["", "tenant"]),
                "ttft": rng.choice([0.0, 0.03]),
                "tbt": rng.choice([0.0, 0.01]),
            }
            actions.append((kind, values))
    return actions


@all_kinds_of_runner
@pytest.mark.parametrize("seed", range(4))
def test_heavy_load_preempts_fails_and_still_adds_up(seed: int, runner: dict[str, Any]) -> None:
    rng = random.Random(seed)
    network = Network(rng=rng, refuse_share=0.1, drop_share=0.05)
    fleet = run(random_actions(rng, 150), blocks=60, network=network, **runner)
    totals: Counter[str] = Counter()
    for worker in fleet.workers.values():
        totals.update({name: int(value) for name, value in worker.stats().counters.items()})
    for name in ("preemptions_total", "transfers_total", "transfer_failures_total"):
        assert totals[name] > 0, name
    assert totals["prefix_hit_tokens_total"] > 0
