"""Scaling from end to end: measured, decided, handed on, written into the policy's status."""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest

from tandem_operator.api import InferenceServiceStatus
from tandem_operator.api.conditions import ConditionType, Judgement
from tandem_operator.api.status import ScalingDecision, SloStatus
from tandem_operator.clients.children import Children
from tandem_operator.clients.workers import WorkerClient
from tandem_operator.errors import ConflictError
from tandem_operator.execute.events import Events
from tandem_operator.execute.executor import Executor
from tandem_operator.facts.observed import Observed, PoolView, RouterView
from tandem_operator.facts.scaling import PolicyDecision, Scaling, ScalingMemory
from tandem_operator.facts.signals import DecodeSignals, PrefillSignals, Signals
from tandem_operator.manifests.revision import revision_of
from tandem_operator.observe.collector import Collector, Latency
from tandem_operator.observe.scaling import ScalingObserver
from tandem_operator.pair import Pair, Role
from tandem_operator.plan import Plan
from tandem_operator.plan.service import reconcile
from tandem_operator.runtime.metrics import Metrics
from tandem_operator.tests.facts import NOW, make_observed, make_pod, make_spec
from tandem_operator.tests.memory_cluster import MemoryCluster

POLICY = {"pools": {"prefill": {"min": 1, "max": 4}, "decode": {"min": 1, "max": 8}}}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Decided:
    """What a pass made of scaling: the decision, and the entries that the status gets."""

    memory: ScalingMemory
    status: SloStatus | None

    @property
    def policy(self) -> PolicyDecision:
        assert self.memory.decision is not None
        return self.memory.decision

    @property
    def entries(self) -> tuple[ScalingDecision, ...]:
        return self.memory.entries

    def judged(self, kind: ConditionType) -> Judgement:
        return self.policy.conditions[kind]


class Bench:
    """Observes, plans and executes what belongs to scaling, with measurements of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.cluster = MemoryCluster()
        self.signals = Signals()
        self.num_readings = 0
        cluster: Any = self.cluster
        self.workers = WorkerClient()
        self.observer = ScalingObserver(cluster, self.workers, self.clock)
        self.executor = Executor(cluster, self.workers, Events(cluster, "me"), Children())

        async def read(*_: Any) -> Signals:
            self.num_readings += 1
            return self.signals

        monkeypatch.setattr(Collector, "read", read)

    async def work(self, facts: Observed) -> Decided | None:
        """One pass; None when nothing is handed on, because the service goes."""
        facts = replace(facts, scaling=await self.observer.observe(facts))
        plan = reconcile(facts, NOW)
        self.observer.remember(facts.uid, plan.memory)
        await self.executor.execute(Plan(policy_status=plan.policy_status), facts)
        if plan.memory is None:
            return None
        status = InferenceServiceStatus.model_validate(plan.status)
        return Decided(plan.memory, status.slo)

    async def decide(self, facts: Observed) -> Decided:
        decided = await self.work(facts)
        assert decided is not None
        assert decided.memory.decision is not None
        return decided


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def observe(autoscaling: dict[str, Any] | None, **changes: Any) -> Observed:
    spec = make_spec(autoscaling=autoscaling) if autoscaling else make_spec()
    pools = Pair(
        PoolView("qwen-prefill", "1", 1, 1, desired=1),
        PoolView("qwen-decode", "2", 2, 2, desired=2),
    )
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
    decided = await bench.work(observe(None))
    assert decided is not None
    assert decided.memory.decision is None


async def test_load_grows_the_pool_that_needs_it(bench: Bench) -> None:
    bench.signals = BUSY
    decision = await bench.decide(observe({"inline": POLICY}))
    assert decision.policy.active
    assert decision.policy.desired.prefill == 1
    assert decision.policy.desired.decode > 2
    news = decision.entries[0]
    assert (news.pool, news.from_, news.how) == (Role.DECODE, 2, "Start")
    assert news.because
    assert decision.judged(ConditionType.SCALING_ACTIVE).holds is True
    assert decision.judged(ConditionType.SCALING_ACTIVE).reason == "Active"


async def test_between_two_ticks_the_decision_stands_without_news(bench: Bench) -> None:
    bench.signals = BUSY
    facts = observe({"inline": POLICY})
    first = await bench.decide(facts)
    bench.signals = Signals()
    second = await bench.decide(facts)
    assert second.policy.desired == first.policy.desired
    assert second.entries == first.entries, "told until the status shows it"
    shown = InferenceServiceStatus(scaling=first.entries)
    third = await bench.decide(replace(facts, status=shown))
    assert third.entries == ()


async def test_stale_metrics_hold(bench: Bench) -> None:
    decision = await bench.decide(observe({"inline": POLICY}))
    assert decision.policy.desired == Pair(1, 2)
    assert decision.judged(ConditionType.METRICS_STALE).holds is True
    assert decision.judged(ConditionType.SCALING_ACTIVE).reason == "MetricsStale"


async def test_a_crashed_worker_is_not_capacity_to_give_up(bench: Bench) -> None:
    facts = observe({"inline": POLICY})
    facts = replace(facts, pods=facts.pods[:2])
    decision = await bench.decide(facts)
    assert decision.policy.desired == Pair(1, 2)


async def test_advisory_only_says_so(bench: Bench) -> None:
    bench.signals = BUSY
    facts = observe({"inline": {**POLICY, "mode": "Advisory"}})
    decision = await bench.decide(facts)
    assert not decision.policy.active
    assert decision.entries[0].how == "Advised"
    assert decision.judged(ConditionType.SCALING_ACTIVE).holds is False
    assert decision.judged(ConditionType.SCALING_ACTIVE).reason == "Advisory"
    bench.clock.now += 10
    shown = InferenceServiceStatus(scaling=decision.entries)
    again = await bench.decide(replace(facts, status=shown))
    assert again.entries == ()


async def test_standing_advice_to_shrink_is_given_once(bench: Bench) -> None:
    bench.signals = Signals(age_seconds=0.0)
    policy = {**POLICY, "mode": "Advisory", "scaleIn": {"hold": "Fixed", "minHoldSeconds": 5}}
    facts = observe({"inline": policy})
    told: list[ScalingDecision] = []
    for _ in range(6):
        decision = await bench.decide(facts)
        told += decision.entries
        facts = replace(facts, status=InferenceServiceStatus(scaling=tuple(told)))
        bench.clock.now += 10
    assert [(item.pool, item.from_, item.to, item.how) for item in told] == [
        (Role.DECODE, 2, 1, "Advised")
    ]


async def test_a_ratio_that_the_bounds_cannot_hold_is_told(bench: Bench) -> None:
    bench.signals = BUSY
    facts = observe({"inline": POLICY})
    ratio = {"mode": "Fixed", "fixed": {"prefill": 1, "decode": 9}}
    spec = make_spec(ratio=ratio, decode={"replicas": 9}, autoscaling={"policyName": "chat"})
    bench.cluster.put(policy_object())
    decision = await bench.decide(replace(facts, spec=spec))
    assert not decision.policy.active
    judged = decision.judged(ConditionType.SCALING_ACTIVE)
    assert (judged.holds, judged.reason) == (False, "RatioUnreachable")
    assert "pools.decode 1 to 8" in judged.message
    assert "ratio.fixed 1:9" in judged.message


async def test_every_service_is_measured(bench: Bench) -> None:
    bench.signals = replace(BUSY, attained_percent=97.6)
    facts = observe(None)
    decided = await bench.work(facts)
    assert decided is not None
    slo = SloStatus(
        ttft_milliseconds=500,
        tbt_milliseconds=200,
        attainment_percent=97,
        requests_per_second=9,
    )
    assert decided.status == slo
    bench.signals, bench.clock.now = Signals(age_seconds=12.0), bench.clock.now + 20
    later = await bench.work(facts)
    assert later is not None
    assert later.status is None, "old figures are not repeated"


async def test_a_service_leaves_the_policy_that_it_does_not_name_any_more(bench: Bench) -> None:
    bench.signals = BUSY
    bench.cluster.put(policy_object())
    stored = bench.cluster.objects[("AutoscalingPolicy", "default", "chat")]
    await bench.decide(observe({"policyName": "chat"}))
    target = stored["status"]["targets"][0]
    assert target["lastDecision"].startswith("Decode 2 to ")
    assert {item["type"] for item in target["conditions"]} >= {"ScalingActive", "MetricsStale"}
    await bench.work(observe(None))
    assert stored["status"]["targets"] == []


async def test_a_deleted_service_leaves_its_policy(bench: Bench) -> None:
    bench.cluster.put(policy_object())
    stored = bench.cluster.objects[("AutoscalingPolicy", "default", "chat")]
    facts = observe({"policyName": "chat"})
    await bench.decide(facts)
    assert await bench.work(replace(facts, deleting_since=NOW)) is None
    assert stored["status"]["targets"] == []


async def test_a_named_policy_is_read_and_told(bench: Bench) -> None:
    facts = observe({"policyName": "chat"})
    missing = await bench.decide(facts)
    assert not missing.policy.active
    assert "create it" in missing.judged(ConditionType.SCALING_ACTIVE).message
    bench.cluster.put(policy_object())
    bench.clock.now += 10
    found = await bench.decide(facts)
    assert found.policy.active
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
    decision = await bench.decide(observe({"policyName": "chat"}))
    assert "has an invalid spec" in decision.policy.because


async def test_the_policys_percentile_is_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def read(_self: Collector, _r: Any, _w: Any, latency: Latency, _c: Any) -> Signals:
        asked.append(latency.percentile)
        return Signals()

    monkeypatch.setattr(Collector, "read", read)
    await bench.decide(observe({"inline": {**POLICY, "objectives": {"percentile": 50}}}))
    await bench.work(observe(None, uid="another"))
    assert asked == [50, 95]


async def test_fields_without_effect_and_a_first_look_are_told(bench: Bench) -> None:
    policy = {**POLICY, "signals": {"source": "Prometheus", "prometheusUrl": "http://p"}}
    decision = await bench.decide(observe({"inline": policy}))
    assert (
        "these fields have no effect in this release: signals.source"
        in decision.judged(ConditionType.SCALING_ACTIVE).message
    )
    assert decision.judged(ConditionType.METRICS_STALE).holds is True
    assert decision.judged(ConditionType.METRICS_STALE).reason == "NotYetMeasured"


async def test_decisions_are_counted_once(bench: Bench) -> None:
    bench.signals = BUSY
    facts = observe({"inline": POLICY})
    decision = await bench.decide(facts)
    metrics = Metrics()
    metrics.record(facts, Plan(scaling=decision.entries))
    shown = InferenceServiceStatus(scaling=decision.entries)
    again = await bench.decide(replace(facts, status=shown))
    metrics.record(facts, Plan(scaling=again.entries))
    labels = {"namespace": "default", "service": "qwen", "role": "decode", "how": "start"}
    name = "tandem_operator_scaling_decisions_total"
    assert metrics.registry.get_sample_value(name, labels) == 1


async def test_a_lost_write_to_the_policy_is_made_good(bench: Bench) -> None:
    bench.signals = BUSY
    bench.cluster.put(policy_object())
    stored = bench.cluster.objects[("AutoscalingPolicy", "default", "chat")]
    facts = observe({"policyName": "chat"})
    bench.cluster.fail["merge"] = ConflictError(409, "changed")
    first = await bench.decide(facts)
    assert "status" not in stored
    bench.cluster.fail.clear()
    bench.signals, bench.clock.now = replace(BUSY, decode=DecodeSignals()), bench.clock.now + 10
    shown = InferenceServiceStatus(scaling=first.entries)
    await bench.decide(replace(facts, status=shown))
    assert stored["status"]["targets"][0]["lastDecision"].startswith("Decode 2 to ")


@pytest.mark.parametrize(("autoscaling", "seconds"), [(None, 10.0), ({"inline": POLICY}, 4.0)])
async def test_a_service_is_measured_once_per_interval(
    bench: Bench, autoscaling: dict[str, Any] | None, seconds: float
) -> None:
    facts = observe(autoscaling)
    for elapsed, readings in ((0.0, 1), (seconds - 0.1, 1), (seconds, 2), (seconds + 1.0, 2)):
        bench.clock.now = 1000.0 + elapsed
        decided = await bench.work(facts)
        assert decided is not None
        assert bench.num_readings == readings
        if autoscaling is not None:
            assert decided.memory.decided_at == 1000.0 + (0.0 if readings == 1 else seconds)


async def test_a_new_policy_decides_at_once(bench: Bench) -> None:
    await bench.work(observe(None))
    bench.clock.now += 1.0
    bench.signals = BUSY
    assert (await bench.decide(observe({"inline": POLICY}))).policy.desired.decode > 2


TO_ZERO = {**POLICY, "scaleToZero": {"enabled": True, "idleSeconds": 60}}


def at_zero(autoscaling: dict[str, Any]) -> Observed:
    pools = Pair(
        PoolView("qwen-prefill", "1", 1, 1, desired=0),
        PoolView("qwen-decode", "2", 2, 2, desired=0),
    )
    facts = observe(autoscaling)
    assert facts.spec is not None
    router = RouterView(revision_of(facts.spec, facts.images), 2, 2, rolled_out=True)
    return replace(facts, pools=pools, pods=(), router=router)


async def test_a_service_at_zero_is_stable(bench: Bench) -> None:
    bench.signals = Signals(age_seconds=0.0)
    facts = at_zero({"inline": TO_ZERO})
    decided = await bench.decide(facts)
    assert decided.policy.desired == Pair(0, 0)
    known = replace(facts, scaling=Scaling(memory=decided.memory))
    status = InferenceServiceStatus.model_validate(reconcile(known, NOW).status)
    reasons = {item.type: item.reason for item in status.conditions}
    assert reasons[ConditionType.MODEL_READY] == "ScaledToZero"
    assert reasons[ConditionType.PROGRESSING] == "Stable"
    assert reasons[ConditionType.ROUTER_READY] == "RoutersReady"
    assert status.updated_revision is None


async def test_a_refused_request_wakes_a_service_at_zero(bench: Bench) -> None:
    bench.signals = Signals(wanted=True)
    assert (await bench.decide(at_zero({"inline": TO_ZERO}))).policy.desired == Pair(1, 1)


async def test_without_scale_to_zero_the_minimum_comes_back_unmeasured(bench: Bench) -> None:
    bench.signals = Signals()
    assert (await bench.decide(at_zero({"inline": POLICY}))).policy.desired == Pair(1, 1)
