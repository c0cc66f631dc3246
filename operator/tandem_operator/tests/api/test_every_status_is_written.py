"""Every leaf of the three statuses is written by some pass."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tandem_operator.api import InferenceServiceStatus
from tandem_operator.crds.kinds import AUTOSCALING_POLICY, INFERENCE_SERVICE, KINDS, WORKER_POOL
from tandem_operator.facts.observed import Observed
from tandem_operator.facts.scaling import PolicyView, Reading, Scaling
from tandem_operator.facts.signals import ClassSignals, DecodeSignals, PrefillSignals, Signals
from tandem_operator.facts.worker import Links, LinkTrouble, ProbeResult
from tandem_operator.pair import Role
from tandem_operator.plan import reconcile
from tandem_operator.tests.api.test_every_field_works import leaves
from tandem_operator.tests.facts import Fleet, make_spec

MEASURED = Signals(
    age_seconds=0.0,
    requests_per_second=9.0,
    num_inflight=20,
    attained_percent=97.0,
    prefill=PrefillSignals(0.5, 30.0, 30.0, 2.0),
    decode=DecodeSignals(0.2, 0.95, 0.99, 40, 5),
    classes=(ClassSignals("interactive", 0.5, 0.2, 97.0),),
)


def paths(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, child in value.items():
            yield from paths(child, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for child in value:
            yield from paths(child, f"{path}[]")
    else:
        yield path


def scaled(fleet: Fleet) -> Observed:
    """What is observed of a fleet with an active policy, of which someone writes a scale."""
    policy = (
        PolicyView(fleet.spec.autoscaling.inline, name="chat") if fleet.spec.autoscaling else None
    )
    fleet.scale(Role.DECODE, 7)
    scaling = Scaling(reading=Reading(MEASURED, 1000.0), policy=policy, startup_seconds=9.0)
    return replace(fleet.observe(), scaling=scaling)


def written() -> dict[str, set[str]]:
    """The leaves of every status that was written in the life of two fleets."""
    found: dict[str, set[str]] = {kind.kind: set() for kind in KINDS}
    plain, active = Fleet(make_spec()), Fleet(make_spec(autoscaling={"inline": {}}))
    plain.settle()
    assert plain.router is not None
    moved = ProbeResult(plain.router.revision, "d", "p", plain.now, "tcp", 10**9, 1.0)
    plain.probe = replace(moved, passed_over="shm: another node", transport="shm")
    plain.step()
    plain.probe = replace(plain.probe, at=plain.now, transport="tcp")
    names = {role: pod.name for role in Role for pod in plain.observe().pods_of(role)}
    trouble = LinkTrouble(names[Role.PREFILL], 3, out_of_use=True, reason="another checksum")
    receiver = plain.pods[names[Role.DECODE]]
    plain.pods[receiver.name] = replace(receiver, links=Links(troubles=(trouble,)))
    plain.step()
    plain.crash(next(iter(plain.pods)))
    plain.step()
    plain.edit(make_spec(engine={"image": "other:1"}))
    plain.step()
    active.settle()
    plans = [*plain.plans, *active.plans, reconcile(scaled(active), active.now)]
    memory = plans[-1].memory
    assert memory is not None
    # The policy decides in one pass, and the targets say what is ignored in the next.
    status = InferenceServiceStatus.model_validate(plans[-1].status)
    again = replace(scaled(active), status=status)
    again = replace(again, scaling=replace(again.scaling, memory=memory, reading=None))
    plans.append(reconcile(again, active.now))
    for plan in plans:
        found[INFERENCE_SERVICE.kind] |= set(paths(plan.status))
        for pool in plan.pool_status.values():
            found[WORKER_POOL.kind] |= set(paths(pool))
        for policy in plan.policy_status:
            targets = [target.to_manifest() for target in policy.targets]
            found[AUTOSCALING_POLICY.kind] |= set(paths({"targets": targets}))
    return found


def test_every_leaf_of_a_status_is_written() -> None:
    found = written()
    listed = [
        (kind.kind, path)
        for kind in KINDS
        for path, _ in leaves(kind.marked_schema()["properties"]["status"])
    ]
    print(len(listed))
    assert not [(kind, path) for kind, path in listed if path not in found[kind]]
