"""Which pairs of workers are probed when, and what status says of pairs that fail."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tandem_operator.api import InferenceServiceStatus
from tandem_operator.api.conditions import ConditionType, condition_of
from tandem_operator.api.kv_transfer import TransferBackend
from tandem_operator.api.status import MAX_PAIRS, ProbedPair, TransportStatus, UnusedPair
from tandem_operator.facts.observed import Observed
from tandem_operator.facts.worker import Links, LinkTrouble, ProbeResult, WorkerPod
from tandem_operator.pair import Pair, Role
from tandem_operator.plan.links import pairs_of_nodes, probed_pairs, unused_pairs
from tandem_operator.plan.notes import note_links
from tandem_operator.plan.rollout.probe import plan_probe
from tandem_operator.runtime.metrics import Metrics
from tandem_operator.tests.facts import NOW, Fleet, make_observed, make_pod, make_spec

AGO = timedelta(hours=1)


def prefill(name: str, node: str, **changes: Any) -> WorkerPod:
    return make_pod(name, role=Role.PREFILL, node=node, **changes)


def decode(name: str, node: str, **changes: Any) -> WorkerPod:
    return make_pod(name, node=node, **changes)


def pair(prefill_node: str, decode_node: str, **changes: Any) -> ProbedPair:
    facts: dict[str, Any] = {
        "prefill_node": prefill_node,
        "decode_node": decode_node,
        "prefill": f"p-{prefill_node}",
        "decode": f"d-{decode_node}",
        "backend": TransferBackend.SHM,
        "megabytes_per_second": 1000,
        "at": NOW - AGO,
    }
    return ProbedPair(**{**facts, **changes})


def seen(pods: list[WorkerPod], pairs: list[ProbedPair], **changes: Any) -> Observed:
    status = InferenceServiceStatus(revision="r1", transport=TransportStatus(pairs=tuple(pairs)))
    return make_observed(pods=tuple(pods), status=status, **changes)


def chosen(observed: Observed, seconds: float = 0.0, revision: str = "r1") -> str:
    assert observed.spec is not None
    call = plan_probe(observed, observed.spec, revision, NOW + timedelta(seconds=seconds))
    return f"{call.peer} {call.pod}" if call is not None else ""


TWO = [prefill("p-a", "a"), decode("d-a", "a"), decode("d-b", "b")]


def test_the_first_probe_and_then_each_new_pair_of_nodes_one_after_the_other() -> None:
    assert chosen(seen(TWO, [])) == "p-a d-a"
    assert chosen(seen(TWO, [pair("a", "a")])) == "p-a d-b"
    assert chosen(seen(TWO, [pair("a", "a"), pair("a", "b")])) == ""
    third = [*TWO, prefill("p-c", "c")]
    assert chosen(seen(third, [pair("a", "a"), pair("a", "b")])) in ("p-c d-a", "p-c d-b")


def test_no_probe_follows_another_at_once() -> None:
    fresh = [pair("a", "a", at=NOW - timedelta(seconds=9))]
    assert chosen(seen(TWO, fresh)) == ""
    assert chosen(seen(TWO, fresh), seconds=2) == "p-a d-b"


def test_each_pair_is_probed_again_after_a_day_the_links_at_rest_between() -> None:
    day = timedelta(days=1)
    old = [pair("a", "a", at=NOW - day), pair("a", "b", at=NOW - day)]
    assert chosen(seen(TWO, old), seconds=-1) == ""
    assert chosen(seen(TWO, old)) == "p-a d-a"
    after = [pair("a", "a", at=NOW), pair("a", "b", at=NOW - day)]
    assert chosen(seen(TWO, after), seconds=59) == ""
    assert chosen(seen(TWO, after), seconds=61) == "p-a d-b"


def test_a_pair_that_was_too_slow_is_soon_tried_again_and_others_go_first() -> None:
    spec = make_spec(kvTransfer={"verify": {"minMegabytesPerSecond": 500}})
    minute = timedelta(seconds=60)
    slow = pair("a", "a", megabytes_per_second=499, at=NOW - minute)
    assert chosen(seen(TWO, [slow], spec=spec)) == "p-a d-b"
    both = [slow, pair("a", "b", at=NOW - minute)]
    assert chosen(seen(TWO, both, spec=spec), seconds=-1) == ""
    assert chosen(seen(TWO, both, spec=spec)) == "p-a d-a"
    well = [slow.model_copy(update={"megabytes_per_second": 500}), both[1]]
    assert chosen(seen(TWO, well, spec=spec)) == ""


def test_a_roll_out_begins_anew() -> None:
    new = [replace(pod, revision="r2") for pod in TWO]
    assert chosen(seen(new, [pair("a", "a"), pair("a", "b")]), revision="r2") == "p-a d-a"


def test_failed_pairs_are_tried_in_turn_and_hold_no_new_one_up() -> None:
    failed = [pair("a", "a", error="refused"), pair("a", "b", error="refused")]
    tried = {chosen(seen(TWO, failed), seconds=10 * turn) for turn in range(4)}
    assert tried == {"p-a d-a", "p-a d-b"}
    third = [*TWO, decode("d-c", "c")]
    assert chosen(seen(third, failed)) == "p-a d-c"


@pytest.mark.parametrize(
    ("transport", "sender", "expected"),
    [
        ("tcp", "p-a", "p-a d-b"),  # worse than what was probed
        ("shm", "p-a", ""),
        ("cudaIpc", "p-a", "p-a d-b"),  # the probed workers are better off again
        ("tcp", "p-a2", "p-a2 d-b"),
        ("cudaIpc", "p-a2", ""),  # others of the same nodes, better off for good
        ("unheard of", "p-a", ""),
        ("tcp", "gone", ""),
    ],
)
def test_a_session_that_changed_its_backend_is_probed_at_once(
    transport: str, sender: str, expected: str
) -> None:
    links = Links({sender: transport})
    pods = [
        prefill("p-a", "a"),
        prefill("p-a2", "a"),
        decode("d-a", "a"),
        decode("d-b", "b", links=links),
    ]
    assert chosen(seen(pods, [pair("a", "a"), pair("a", "b")])) == expected


def test_only_workers_that_can_be_called_are_chosen() -> None:
    unknown = [prefill("p-a", "a", admin_token=""), decode("d-a", "a", admin_token="")]
    assert chosen(seen(unknown, [])) == ""
    assert chosen(seen([*unknown, decode("d-b", "b")], [])) == "p-a d-b"
    assert chosen(seen([prefill("p-a", "a", ready=False), decode("d-a", "a")], [])) == ""


def test_every_node_of_a_large_fleet_is_in_some_pair() -> None:
    senders = tuple(prefill(f"p{n}", f"s{n:02}") for n in range(9))
    receivers = tuple(decode(f"d{n}", f"r{n:02}") for n in range(30))
    pairs = pairs_of_nodes(Pair(senders, receivers))
    assert len(pairs) == len(set(pairs)) == MAX_PAIRS
    assert {node for nodes in pairs for node in nodes} == {p.node for p in (*senders, *receivers)}


def result(**changes: Any) -> ProbeResult:
    facts: dict[str, Any] = {
        "transport": "shm",
        "num_bytes": 10**9,
        "seconds": 0.5,
        "latency_seconds": 0.00025,
        "prefill_node": "a",
        "decode_node": "a",
    }
    return ProbeResult("r1", "d-a", "p-a", NOW, **{**facts, **changes})


def test_a_probe_becomes_a_record_of_its_nodes() -> None:
    (made,) = probed_pairs(seen(TWO, [pair("a", "a"), pair("x", "a")], probe=result()), "r1")
    assert (made.prefill_node, made.decode_node, made.at) == ("a", "a", NOW)
    assert (made.megabytes_per_second, made.latency_microseconds) == (2000, 250)
    assert (made.fell_back_from, made.error) == (None, "")
    other = probed_pairs(seen(TWO, [], probe=replace(result(), revision="r0")), "r1")
    assert other == ()


def test_a_worse_backend_is_remembered_until_the_better_one_is_back() -> None:
    (fallen,) = probed_pairs(seen(TWO, [pair("a", "a")], probe=result(transport="tcp")), "r1")
    assert (fallen.backend, fallen.fell_back_from) == ("Tcp", "Shm")
    fallen = fallen.model_copy(update={"at": NOW - AGO})
    (still,) = probed_pairs(seen(TWO, [fallen], probe=result(transport="tcp")), "r1")
    assert still.fell_back_from == "Shm"
    (back,) = probed_pairs(seen(TWO, [fallen], probe=result()), "r1")
    assert (back.backend, back.fell_back_from) == ("Shm", None)


def test_a_failure_that_goes_on_costs_no_write() -> None:
    failed = pair("a", "a", error="refused")
    observed = seen(TWO, [failed], probe=result(error="refused", transport="", seconds=0.0))
    assert probed_pairs(observed, "r1") == (failed,)
    assert chosen(observed, seconds=9) == "", "and yet it isn't tried again at once"


OUT = LinkTrouble("p-a", 3, out_of_use=True, reason="another checksum")


def test_pairs_out_of_use_are_those_that_decode_workers_name() -> None:
    back = LinkTrouble("p-a", 5, out_of_use=False, reason="long ago")
    gone = LinkTrouble("p-x", 5, out_of_use=True, reason="a worker that is gone")
    pods = [
        prefill("p-a", "a"),
        decode("d-a", "a", links=Links(troubles=(OUT, gone))),
        decode("d-b", "b", links=Links(troubles=(back,))),
    ]
    (found,) = unused_pairs(seen(pods, []), "r1")
    assert (found.prefill, found.decode) == ("p-a", "d-a")
    assert found.because == "3 faults, the last one: another checksum"


def test_a_decode_worker_that_does_not_answer_is_taken_by_its_last_word() -> None:
    before = (UnusedPair(prefill="p-a", decode="d-a", because="3 faults"),)
    status = InferenceServiceStatus(revision="r1", transport=TransportStatus(out_of_use=before))
    observed = make_observed(pods=tuple(TWO), status=status)
    assert unused_pairs(observed, "r1") == before
    answers = [replace(pod, links=Links()) for pod in TWO]
    assert unused_pairs(replace(observed, pods=tuple(answers)), "r1") == ()


def named(fleet: Fleet, kind: ConditionType) -> tuple[str, str, str]:
    found = condition_of(fleet.status.conditions, kind)
    assert found is not None
    return str(found.status), found.reason, found.message


def pairs_out_of_use(fleet: Fleet) -> float | None:
    """What the operator's metric says after the last pass."""
    metrics = Metrics()
    metrics.record(fleet.observe(), fleet.plans[-1])
    labels = {"namespace": "default", "service": "qwen"}
    return metrics.registry.get_sample_value("tandem_operator_pairs_out_of_use", labels)


def test_one_pair_out_of_use_is_named_and_does_not_hold_ready_back() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    sender = next(name for name in fleet.pods if "prefill" in name)
    one, other = sorted(name for name in fleet.pods if "decode" in name)
    trouble = Links(troubles=(replace(OUT, peer=sender),))
    fleet.pods[one] = replace(fleet.pods[one], links=trouble)
    plan = fleet.step()
    status, reason, message = named(fleet, ConditionType.TRANSPORT_VERIFIED)
    assert (status, reason) == ("False", "PairOutOfUse")
    assert f"{one} takes no KV from {sender} (3 faults, the last one: another" in message
    assert "tandem doctor" in message
    assert named(fleet, ConditionType.READY)[0] == "True"
    assert named(fleet, ConditionType.DEGRADED)[:2] == ("True", "PairOutOfUse")
    told = {note.reason: note for note in plan.events}
    assert told["PairOutOfUse"].warning
    assert one in told["PairOutOfUse"].message
    assert "PairOutOfUse" not in {note.reason for note in fleet.step().events}
    assert pairs_out_of_use(fleet) == 1.0
    fleet.pods[other] = replace(fleet.pods[other], links=trouble)
    fleet.step()
    assert named(fleet, ConditionType.TRANSPORT_VERIFIED)[1] == "EveryPairOutOfUse"
    assert named(fleet, ConditionType.READY)[0] == "False"
    for name in (one, other):
        fleet.pods[name] = replace(fleet.pods[name], links=Links())
    plan = fleet.step()
    assert named(fleet, ConditionType.TRANSPORT_VERIFIED)[:2] == ("True", "KvMoved")
    assert named(fleet, ConditionType.READY)[0] == "True"
    assert sum(note.reason == "PairInUse" for note in plan.events) == 2
    assert pairs_out_of_use(fleet) == 0.0


def test_a_pair_that_ended_with_its_worker_is_no_news() -> None:
    old = TransportStatus(out_of_use=(UnusedPair(prefill="p-a", decode="gone", because="3"),))
    observed = make_observed(pods=tuple(TWO), status=InferenceServiceStatus(transport=old))
    assert note_links(observed, TransportStatus()) == []


def test_some_pairs_of_nodes_that_fail_degrade_and_all_of_them_hold_ready_back() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    assert fleet.router is not None
    names = sorted(fleet.pods)
    for number, name in enumerate(names):
        fleet.pods[name] = replace(fleet.pods[name], node=f"node-{number}")
    one, other, sender = names
    facts = {"transport": "tcp", "num_bytes": 10**9, "seconds": 1.0, "prefill_node": "node-2"}
    for name, node, error, verified in (
        (one, "node-0", "", ("True", "KvMoved")),
        (other, "node-1", "no route to host", ("False", "SomePairsFail")),
        (one, "node-0", "no route to host", ("False", "ProbeFailed")),
    ):
        fleet.now += timedelta(seconds=20)
        told: dict[str, Any] = {**facts, "decode_node": node, "error": error}
        fleet.probe = ProbeResult(fleet.router.revision, name, sender, fleet.now, **told)
        fleet.step()
        assert named(fleet, ConditionType.TRANSPORT_VERIFIED)[:2] == verified
        held = verified[1] == "ProbeFailed"
        assert named(fleet, ConditionType.READY)[0] == ("False" if held else "True")
    _, _, message = named(fleet, ConditionType.READY)
    assert f"could not fetch KV from {sender}: no route to host" in message


def test_a_fall_back_from_a_better_backend_holds_ready_back_and_says_why() -> None:
    fleet = Fleet(make_spec())
    fleet.settle()
    assert fleet.router is not None
    facts: dict[str, Any] = {"num_bytes": 10**9, "seconds": 1.0}
    for transport, why in (("shm", ""), ("tcp", "shm: the folder is full")):
        fleet.now += timedelta(seconds=20)
        fleet.probe = ProbeResult(
            fleet.router.revision, "d", "p", fleet.now, transport, passed_over=why, **facts
        )
        fleet.step()
    status, reason, message = named(fleet, ConditionType.TRANSPORT_VERIFIED)
    assert (status, reason) == ("False", "FellBack")
    assert "1000 MB/s over Tcp between p and d, which used Shm before" in message
    assert "(shm: the folder is full): run `tandem doctor`" in message
    assert named(fleet, ConditionType.READY)[0] == "False"
    assert fleet.status.transport is not None
    assert fleet.status.transport.backend == "Tcp", "what kubectl get shows"
