"""The scaler: measurements in, one decision for both pools out, and what is told of it."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tandem_operator.api import InferenceServiceStatus
from tandem_operator.errors import ConflictError
from tandem_operator.facts.observed import Observed, PoolView
from tandem_operator.facts.signals import DecodeSignals, PrefillSignals, Signals
from tandem_operator.observe.collector import Collector
from tandem_operator.pair import Pair, Role
from tandem_operator.plan import Plan
from tandem_operator.plan.scale.scaler import PolicyScaler
from tandem_operator.runtime.metrics import Metrics
from tandem_operator.tests.facts import NOW, make_observed, make_pod, make_spec
from tandem_operator.tests.memory_cluster import MemoryCluster

POLICY = {"pools": {"prefill": {"min": 1, "max": 4}, "decode": {"min": 1, "max": 8}}}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.cluster = MemoryCluster()
        self.signals = Signals()
        self.scaler = PolicyScaler(self.cluster, 8100, clock=self.clock)  # type: ignore[arg-type]

        async def read(*_: Any) -> Signals:
            return self.signals

        monkeypatch.setattr(Collector, "read", read)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def observe(autoscaling: dict[str, Any] | None, **changes: Any) -> Observed:
    spec = make_spec(autoscaling=autoscaling) if autoscaling else make_spec()
    pools = {
        Role.PREFILL: PoolView("qwen-prefill", "1", 1, 1, desired=1),
        Role.DECODE: PoolView("qwen-decode", "2", 2, 2, desired=2),
    }
    pods = (
        make_pod("p", role=Role.PREFILL),
        make_pod("d1", ready_since=NOW - timedelta(minutes=4)),
        make_pod("d2"),
    )
    return make_observed(spec, pools=pools, pods=pods, **changes)


def policy_object() -> dict[str, Any]:
    return {
        "kind": "AutoscalingPolicy",
        "metadata": {"name": "chat", "namespace": "default"},
        "spec": POLICY,
    }


BUSY = Signals(
    age_seconds=0.0,
    requests_per_second=9.0,
    num_inflight=20,
    prefill=PrefillSignals(0.5, 0.0, 0.5),
    decode=DecodeSignals(0.2, 0.95, 0.99, 40, 5),
)


async def test_no_policy_no_decision(bench: Bench) -> None:
    assert await bench.scaler.decide(observe(None)) is None
    await bench.scaler.close()


async def test_load_grows_the_pool_that_needs_it(bench: Bench) -> None:
    bench.signals = BUSY
    decision = await bench.scaler.decide(observe({"inline": POLICY}))
    assert decision is not None
    assert decision.active
    assert decision.desired.prefill == 1
    assert decision.desired.decode > 2
    news = decision.decisions[0]
    assert (news.pool, news.from_, news.how) == ("Decode", 2, "Start")
    assert news.because
    assert decision.conditions["ScalingActive"][:2] == (True, "Active")


async def test_between_two_ticks_the_decision_stands_without_news(bench: Bench) -> None:
    bench.signals = BUSY
    facts = observe({"inline": POLICY})
    first = await bench.scaler.decide(facts)
    bench.signals = Signals()
    second = await bench.scaler.decide(facts)
    assert first is not None
    assert second is not None
    assert second.desired == first.desired
    assert second.decisions == first.decisions, "told until the status shows it"
    shown = InferenceServiceStatus(scaling=first.decisions)
    third = await bench.scaler.decide(replace(facts, status=shown))
    assert third is not None
    assert third.decisions == ()


async def test_stale_metrics_hold(bench: Bench) -> None:
    decision = await bench.scaler.decide(observe({"inline": POLICY}))
    assert decision is not None
    assert decision.desired == Pair(1, 2)
    assert decision.conditions["MetricsStale"][0] is True
    assert decision.conditions["ScalingActive"][1] == "MetricsStale"


async def test_a_crashed_worker_is_not_capacity_to_give_up(bench: Bench) -> None:
    facts = observe({"inline": POLICY})
    facts = replace(facts, pods=facts.pods[:2])
    decision = await bench.scaler.decide(facts)
    assert decision is not None
    assert decision.desired == Pair(1, 2)


async def test_advisory_only_says_so(bench: Bench) -> None:
    bench.signals = BUSY
    facts = observe({"inline": {**POLICY, "mode": "Advisory"}})
    decision = await bench.scaler.decide(facts)
    assert decision is not None
    assert not decision.active
    assert decision.decisions[0].how == "Advised"
    assert decision.conditions["ScalingActive"][:2] == (False, "Advisory")
    bench.clock.now += 10
    shown = InferenceServiceStatus(scaling=decision.decisions)
    again = await bench.scaler.decide(replace(facts, status=shown))
    assert again is not None
    assert again.decisions == ()


async def test_standing_advice_to_shrink_is_given_once(bench: Bench) -> None:
    bench.signals = Signals(age_seconds=0.0)
    policy = {**POLICY, "mode": "Advisory", "scaleIn": {"hold": "Fixed", "minHoldSeconds": 5}}
    facts = observe({"inline": policy})
    told = []
    for _ in range(6):
        decision = await bench.scaler.decide(facts)
        assert decision is not None
        told += decision.decisions
        facts = replace(facts, status=InferenceServiceStatus(scaling=tuple(told)))
        bench.clock.now += 10
    assert [(item.pool, item.from_, item.to, item.how) for item in told] == [
        ("Decode", 2, 1, "Advised")
    ]


async def test_a_ratio_that_the_bounds_cannot_hold_is_told(bench: Bench) -> None:
    bench.signals = BUSY
    facts = observe({"inline": POLICY})
    ratio = {"mode": "Fixed", "fixed": {"prefill": 1, "decode": 9}}
    spec = make_spec(ratio=ratio, decode={"replicas": 9}, autoscaling={"policyName": "chat"})
    bench.cluster.put(policy_object())
    decision = await bench.scaler.decide(replace(facts, spec=spec))
    assert decision is not None
    assert not decision.active
    held, reason, message = decision.conditions["ScalingActive"]
    assert (held, reason) == (False, "RatioUnreachable")
    assert "pools.decode 1 to 8" in message
    assert "ratio.fixed 1:9" in message


async def test_every_service_is_measured(bench: Bench) -> None:
    bench.signals = replace(BUSY, attained_percent=97.6)
    facts = observe(None)
    assert await bench.scaler.decide(facts) is None
    assert bench.scaler.measured(facts) == {
        "ttft_milliseconds": 500,
        "tbt_milliseconds": 200,
        "attainment_percent": 97,
        "requests_per_second": 9,
    }
    bench.signals, bench.clock.now = Signals(age_seconds=12.0), bench.clock.now + 20
    await bench.scaler.decide(facts)
    assert bench.scaler.measured(facts) == {}


async def test_a_service_leaves_the_policy_that_it_does_not_name_any_more(bench: Bench) -> None:
    bench.signals = BUSY
    bench.cluster.put(policy_object())
    stored = bench.cluster.objects[("AutoscalingPolicy", "default", "chat")]
    await bench.scaler.decide(observe({"policyName": "chat"}))
    target = stored["status"]["targets"][0]
    assert target["lastDecision"].startswith("Decode 2 to ")
    assert {item["type"] for item in target["conditions"]} >= {"ScalingActive", "MetricsStale"}
    await bench.scaler.decide(observe(None))
    assert stored["status"]["targets"] == []


async def test_a_deleted_service_leaves_its_policy(bench: Bench) -> None:
    bench.cluster.put(policy_object())
    stored = bench.cluster.objects[("AutoscalingPolicy", "default", "chat")]
    facts = observe({"policyName": "chat"})
    await bench.scaler.decide(facts)
    assert await bench.scaler.decide(replace(facts, deleting_since=NOW)) is None
    assert stored["status"]["targets"] == []


async def test_a_named_policy_is_read_and_told(bench: Bench) -> None:
    facts = observe({"policyName": "chat"})
    missing = await bench.scaler.decide(facts)
    assert missing is not None
    assert not missing.active
    assert "create it" in missing.conditions["ScalingActive"][2]
    bench.cluster.put(policy_object())
    bench.clock.now += 10
    found = await bench.scaler.decide(facts)
    assert found is not None
    assert found.active
    stored = bench.cluster.objects[("AutoscalingPolicy", "default", "chat")]
    assert stored["status"]["targets"][0]["name"] == "qwen"


async def test_a_policy_that_cannot_be_read_is_told(bench: Bench) -> None:
    bench.cluster.put(
        {
            "kind": "AutoscalingPolicy",
            "metadata": {"name": "chat", "namespace": "default"},
            "spec": {"bogus": 1},
        }
    )
    decision = await bench.scaler.decide(observe({"policyName": "chat"}))
    assert decision is not None
    assert "can't be read" in decision.because


async def test_fields_without_effect_and_a_first_look_are_told(bench: Bench) -> None:
    policy = {**POLICY, "signals": {"source": "Prometheus", "prometheusUrl": "http://p"}}
    decision = await bench.scaler.decide(observe({"inline": policy}))
    assert decision is not None
    assert (
        "without effect in this release: signals.source" in decision.conditions["ScalingActive"][2]
    )
    assert decision.conditions["MetricsStale"][:2] == (True, "NotYetMeasured")


async def test_decisions_are_counted_once(bench: Bench) -> None:
    bench.signals = BUSY
    facts = observe({"inline": POLICY})
    decision = await bench.scaler.decide(facts)
    assert decision is not None
    metrics = Metrics()
    metrics.record(replace(facts, decision=decision), Plan())
    shown = InferenceServiceStatus(scaling=decision.decisions)
    metrics.record(replace(facts, decision=decision, status=shown), Plan())
    labels = {"namespace": "default", "service": "qwen", "role": "decode", "how": "start"}
    name = "tandem_operator_scaling_decisions_total"
    assert metrics.registry.get_sample_value(name, labels) == 1


async def test_a_lost_write_to_the_policy_is_made_good(bench: Bench) -> None:
    bench.signals = BUSY
    bench.cluster.put(policy_object())
    stored = bench.cluster.objects[("AutoscalingPolicy", "default", "chat")]
    facts = observe({"policyName": "chat"})
    bench.cluster.fail["merge"] = ConflictError(409, "changed")
    first = await bench.scaler.decide(facts)
    assert first is not None
    assert "status" not in stored
    bench.cluster.fail.clear()
    bench.signals, bench.clock.now = replace(BUSY, decode=DecodeSignals()), bench.clock.now + 10
    shown = InferenceServiceStatus(scaling=first.decisions)
    await bench.scaler.decide(replace(facts, status=shown))
    assert stored["status"]["targets"][0]["lastDecision"].startswith("Decode 2 to ")
