"""What the operator makes of a spec, in full: what a field has no effect on, it doesn't change."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.facts.observed import Claimable, DeviceView, NodeView, Observed, PoolView
from tandem_operator.facts.scaling import PolicyView, Reading, Scaling, ScalingMemory
from tandem_operator.facts.signals import DecodeSignals, PrefillSignals, Signals
from tandem_operator.manifests.claims import build_claim_templates
from tandem_operator.manifests.fleet import build_fleet, build_owner
from tandem_operator.manifests.router import build_router
from tandem_operator.manifests.worker import Blueprint, build_worker_pod
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.scale.policy import plan_scaling
from tandem_operator.plan.wiring import choose_wiring
from tandem_operator.tests.facts import NOW, make_observed, make_pod

NODES = (NodeView("node-0", True, {"rdma/ib": 64, "rdma/other": 64}),)
CLAIMABLE = Claimable(
    (DeviceView("node-0", "dra.net", "nic", {"dra.net/ifName": "r0", "dra.net/cloudNetwork": 0}),),
    frozenset({"dranet", "rdma", "gpu.nvidia.com", "gpu.example.com"}),
)
BUSY = Signals(age_seconds=0.0, requests_per_second=9.0, num_inflight=20)
IDLE = Signals(age_seconds=0.0, idle_seconds=2000.0)
STALE = replace(BUSY, age_seconds=40.0)
SITUATIONS = (
    replace(BUSY, prefill=PrefillSignals(ttft_seconds=3.0, queued_seconds=8.0, busy_workers=2.0)),
    replace(BUSY, decode=DecodeSignals(0.04, 0.95, 0.97, 50)),
    replace(BUSY, decode=DecodeSignals(0.04, 0.6, 0.7, 50)),
    replace(BUSY, decode=DecodeSignals(0.09, 0.3, 0.3, 50)),
    replace(
        BUSY,
        prefill=PrefillSignals(ttft_seconds=6.0, busy_workers=1.5, queued_seconds=0.1),
        decode=DecodeSignals(kv_usage=0.99, max_kv_usage=1.0, num_running=9, num_waiting=5),
    ),
    STALE,
    IDLE,
)


def manifests(spec: InferenceServiceSpec) -> list[dict[str, Any]]:
    """Everything that is written for a service of one fixed revision."""
    pools = Pair.build(lambda role: PoolView(f"qwen-{role}", str(role), 1, 1, 1))
    observed = make_observed(spec, pools=pools, nodes=NODES)
    owner = build_owner(observed)
    num_gpus = max(spec.pools.map(lambda pool: pool.gpus_per_pod))
    wiring = choose_wiring(spec.rdma, NODES, num_gpus, claimable=CLAIMABLE)
    workers = [
        build_worker_pod(observed, spec, Blueprint(role, f"qwen-{role}-a", "r1", wiring))
        for role in Role
    ]
    return [
        *workers,
        *build_router(observed, spec, "r1", owner),
        *build_fleet(observed, spec, owner),
        *build_claim_templates(observed, spec, wiring, owner),
    ]


def decisions(
    spec: InferenceServiceSpec, situations: tuple[Signals, ...] = SITUATIONS
) -> list[str]:
    """What an inline policy decides in many situations, each of which lasts for a while."""
    return [
        said
        for signals in situations
        for size, pending in ((2, False), (2, True), (1, False))
        for said in _follow(spec, signals, _fleet(spec, size, pending))
    ]


def _follow(spec: InferenceServiceSpec, signals: Signals, fleet: Observed) -> list[str]:
    assert spec.autoscaling is not None
    memory = ScalingMemory()
    said = []
    for seconds in (0, 30, 90, 200, 400):
        scaling = Scaling(
            reading=Reading(signals, float(seconds)),
            policy=PolicyView(spec.autoscaling.inline),
            startup_seconds=150.0,
            memory=memory,
        )
        memory = plan_scaling(replace(fleet, scaling=scaling), spec, NOW)
        said.append(repr((memory.decision, memory.state, memory.advised)))
    return said


def _fleet(spec: InferenceServiceSpec, size: int, pending: bool) -> Observed:
    wanted = size + 1 if pending else size
    pools = Pair(
        PoolView("qwen-prefill", "1", size, size, desired=wanted),
        PoolView("qwen-decode", "2", size, size, desired=size),
    )
    pods = [make_pod(f"{role}{i}", role=role) for role in Role for i in range(size)]
    if pending:
        since = NOW - timedelta(seconds=1000)
        pods.append(
            make_pod("late", role=Role.PREFILL, created=since, started=False, ready=False, ip="")
        )
    return make_observed(spec, pools=pools, pods=tuple(pods))
