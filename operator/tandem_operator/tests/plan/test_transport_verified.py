"""TransportVerified: what the probe showed, and what it means for Ready."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tandem_operator.api.conditions import Condition, ConditionType, condition_of
from tandem_operator.facts.observed import NodeView
from tandem_operator.facts.worker import ProbeResult
from tandem_operator.plan import reconcile
from tandem_operator.plan.rollout.probe import plan_probe
from tandem_operator.tests.facts import Fleet, make_spec


def judged(fleet: Fleet, **result: Any) -> tuple[Condition, Condition]:
    """(TransportVerified, Ready) after a probe with this result."""
    assert fleet.router is not None
    fleet.now += timedelta(seconds=1)
    facts = {"transport": "tcp", "num_bytes": 10**9, "seconds": 1.0, **result}
    fleet.probe = ProbeResult(fleet.router.revision, "d", "p", fleet.now, **facts)
    observed = replace(fleet.observe(), nodes=(NodeView("n", True, {"rdma/ib": 8}),))
    plan = reconcile(observed, fleet.now)
    assert plan.status is not None
    fleet.status = fleet.status.model_validate(plan.status)
    verified = condition_of(fleet.status.conditions, ConditionType.TRANSPORT_VERIFIED)
    ready = condition_of(fleet.status.conditions, ConditionType.READY)
    assert verified is not None
    assert ready is not None
    return verified, ready


def settled(**changes: Any) -> Fleet:
    fleet = Fleet(make_spec(**changes))
    fleet.settle()
    return fleet


@pytest.mark.parametrize(
    ("changes", "result", "reason", "ready"),
    [
        ({}, {}, "KvMoved", "True"),
        ({}, {"error": "refused"}, "ProbeFailed", "False"),
        ({}, {"seconds": 10_000.0}, "TooSlow", "False"),
        ({"kvTransfer": {"backend": "Shm"}}, {}, "OtherBackend", "False"),
        ({"rdma": {"mode": "DevicePlugin"}}, {}, "FellBackToTcp", "False"),
        ({"rdma": {"mode": "Efa"}}, {"transport": "shm"}, "FellBackToTcp", "False"),
    ],
)
def test_what_was_seen(
    changes: dict[str, Any], result: dict[str, Any], reason: str, ready: str
) -> None:
    verify = {"verify": {"minMegabytesPerSecond": 1}}
    changes = {**changes, "kvTransfer": {**verify, **changes.get("kvTransfer", {})}}
    fleet = settled(**changes)
    verified, is_ready = judged(fleet, **result)
    assert (verified.reason, is_ready.status) == (reason, ready)
    degraded = condition_of(fleet.status.conditions, ConditionType.DEGRADED)
    assert degraded is not None
    assert (degraded.status == "True") is (reason != "KvMoved")


def test_what_was_passed_over_is_kept_until_the_next_probe() -> None:
    """Auto never falls back in silence."""
    fleet = settled(kvTransfer={"verify": {"minMegabytesPerSecond": 1}})
    why = "cudaIpc: TANDEM_SHM_DIR is not set; shm: TANDEM_SHM_DIR is not set"
    judged(fleet, passed_over=why + "x" * 2000)
    transport = fleet.status.transport
    assert transport is not None
    assert transport.passed_over.startswith(why)
    assert len(transport.passed_over) == 1024
    judged(fleet, transport="cudaIpc")
    assert fleet.status.transport is not None
    assert (fleet.status.transport.backend, fleet.status.transport.passed_over) == ("CudaIpc", "")


def test_report_does_not_hold_ready_back() -> None:
    fleet = settled(kvTransfer={"verify": {"mode": "Report"}})
    assert judged(fleet, error="refused")[1].status == "True"


def test_off_makes_no_probe() -> None:
    fleet = settled(kvTransfer={"verify": {"mode": "Off"}})
    assert fleet.probe is None
    found = condition_of(fleet.status.conditions, ConditionType.TRANSPORT_VERIFIED)
    assert found is not None
    assert (found.status, found.reason) == ("Unknown", "NotChecked")


def test_an_operator_that_restarts_trusts_the_condition() -> None:
    fleet = settled()
    fleet.probe = None
    assert fleet.step().quiet
    assert fleet.router is not None
    assert plan_probe(fleet.observe(), fleet.spec, fleet.router.revision, fleet.now) is None


def test_a_failed_probe_is_repeated_after_a_while() -> None:
    fleet = settled()
    judged(fleet, error="refused")
    assert fleet.router is not None
    revision = fleet.router.revision
    assert plan_probe(fleet.observe(), fleet.spec, revision, fleet.now) is None
    fleet.step(seconds=11)
    assert plan_probe(fleet.observe(), fleet.spec, revision, fleet.now) is not None
