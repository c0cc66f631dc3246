"""Pods, routers and nodes as the API server shows them."""

from typing import Any

import pytest

from tandem_operator.facts.observed import PoolView
from tandem_operator.facts.worker import WorkerPorts
from tandem_operator.observe.objects import (
    read_devices,
    read_node,
    read_pools,
    read_router,
    read_spec,
    read_status,
    read_workers,
)
from tandem_operator.observe.pod import read_pod, read_router_pod, read_time
from tandem_operator.pair import Pair


def raw_pod(status: dict[str, Any], **annotations: str) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "qwen-decode-a",
            "uid": "u1",
            "creationTimestamp": "2026-11-22T12:00:00Z",
            "labels": {"tandem.dev/role": "decode", "tandem.dev/revision": "r1"},
            "annotations": {f"tandem.dev/{key}": value for key, value in annotations.items()},
            "ownerReferences": [{"uid": "pool"}],
        },
        "spec": {
            "nodeName": "n1",
            "containers": [{"name": "engine"}],
            "volumes": [
                {"name": "shm", "emptyDir": {}},
                {"name": "admin-token", "secret": {"secretName": "s"}},
            ],
        },
        "status": status,
    }


def engine(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": "engine", "state": state}]


def test_a_ready_worker() -> None:
    pod = read_pod(
        raw_pod(
            {
                "phase": "Running",
                "podIP": "10.0.0.1",
                "conditions": [
                    {
                        "type": "Ready",
                        "status": "True",
                        "lastTransitionTime": "2026-11-22T12:00:09Z",
                    }
                ],
                "containerStatuses": engine({"running": {}}),
            },
            cost="7",
            restarts="2",
            **{"http-port": "20001", "wire-port": "20002", "bootstrap-port": "9000"},
        )
    )
    assert pod is not None
    assert pod.ready
    assert pod.started
    assert pod.live
    assert (pod.cost, pod.restarts, pod.admin_secret) == (7, 2, "s")
    assert pod.ports == WorkerPorts(20001, 20002, 9000)
    assert pod.ready_since is not None


def test_a_crashed_worker() -> None:
    ended = {"exitCode": 137, "reason": "OOMKilled", "finishedAt": "2026-11-22T12:05:00Z"}
    pod = read_pod(raw_pod({"phase": "Failed", "containerStatuses": engine({"terminated": ended})}))
    assert pod is not None
    assert pod.failure is not None
    assert (pod.failure.exit_code, pod.failure.reason) == (137, "OOMKilled")
    assert not pod.live


@pytest.mark.parametrize(("code", "crashed"), [(0, False), (143, False), (137, True), (1, True)])
def test_a_deleted_worker_that_ends_in_order_has_not_failed(code: int, crashed: bool) -> None:
    """Else every scale-in and roll-out would push real crashes out of status.failures."""
    ended = {"exitCode": code, "finishedAt": "2026-11-22T12:05:00Z"}
    phase = "Failed" if code else "Succeeded"
    raw = raw_pod({"phase": phase, "containerStatuses": engine({"terminated": ended})})
    kept = read_pod(raw)
    raw["metadata"]["deletionTimestamp"] = "2026-11-22T12:04:00Z"
    deleted = read_pod(raw)
    assert kept is not None
    assert kept.failure is not None
    assert deleted is not None
    assert (deleted.failure is not None) == crashed
    assert not deleted.live


SIDECAR = {"name": "proxy", "state": {"running": {}}}
ENDED = {"exitCode": 139, "reason": "Error", "finishedAt": "2026-11-22T12:05:00Z"}


@pytest.mark.parametrize("phase", ["Running", "Failed"])
def test_an_engine_that_ends_beside_a_sidecar_has_failed(phase: str) -> None:
    status = {"phase": phase, "containerStatuses": [SIDECAR, *engine({"terminated": ENDED})]}
    pod = read_pod(raw_pod(status))
    assert pod is not None
    assert pod.failure is not None
    assert (pod.failure.exit_code, pod.failure.reason) == (139, "Error")
    assert not pod.live


def test_a_sidecar_that_ends_is_trouble_and_no_failure_of_the_engine() -> None:
    ended = {"name": "proxy", "state": {"terminated": {"exitCode": 1, "reason": "Error"}}}
    status = {"phase": "Running", "containerStatuses": [ended, *engine({"running": {}})]}
    pod = read_pod(raw_pod(status))
    assert pod is not None
    assert pod.failure is None
    assert pod.trouble_reason == "SidecarEnded"
    assert "proxy ended with exit code 1" in pod.trouble
    assert "delete the pod" in pod.trouble


@pytest.mark.parametrize("place", ["initContainerStatuses", "containerStatuses"])
def test_trouble_of_any_container_is_named(place: str) -> None:
    loop = {
        "name": "proxy",
        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}},
        "lastState": {"terminated": {"exitCode": 2, "reason": "Error", "message": "no config"}},
    }
    pod = read_pod(raw_pod({"phase": "Pending", place: [loop]}))
    assert pod is not None
    assert pod.trouble_reason == "CrashLoopBackOff"
    assert pod.trouble == (
        "container proxy: CrashLoopBackOff: back-off 5m0s; it ended with exit code 2 (Error):"
        " no config"
    )


@pytest.mark.parametrize(
    ("since", "served"), [("2026-11-22T12:05:00Z", True), ("2026-11-22T12:00:00Z", False)]
)
def test_whether_a_worker_served_outlives_it(since: str, served: bool) -> None:
    ready = {"type": "Ready", "status": "False", "lastTransitionTime": since}
    ended = engine({"terminated": {**ENDED, "startedAt": "2026-11-22T12:00:03Z"}})
    pod = read_pod(raw_pod({"conditions": [ready], "containerStatuses": ended}))
    assert pod is not None
    assert pod.served == served
    annotated = read_pod(raw_pod({}, served="true"))
    assert annotated is not None
    assert annotated.served


def test_an_init_container_that_fails_is_the_evidence() -> None:
    init = [{"name": "memlock", "state": {"terminated": {**ENDED, "exitCode": 7}}}]
    waiting = engine({"waiting": {"reason": "PodInitializing"}})
    status = {"phase": "Failed", "initContainerStatuses": init, "containerStatuses": waiting}
    pod = read_pod(raw_pod(status))
    assert pod is not None
    assert pod.failure is not None
    assert (pod.failure.exit_code, pod.failure.container) == (7, "memlock")
    assert pod.failure.reason == "container memlock: Error"


def test_an_evicted_worker_has_evidence_too() -> None:
    status = {"phase": "Failed", "reason": "Evicted", "message": "disk", "startTime": None}
    pod = read_pod(raw_pod(status))
    assert pod is not None
    assert pod.failure is not None
    assert (pod.failure.reason, pod.failure.log, pod.failure.exit_code) == ("Evicted", "disk", None)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (
            {
                "phase": "Pending",
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": "0/2 nodes",
                    }
                ],
            },
            "Unschedulable",
        ),
        (
            {
                "phase": "Pending",
                "containerStatuses": engine(
                    {"waiting": {"reason": "ErrImagePull", "message": "no"}}
                ),
            },
            "ErrImagePull",
        ),
        (
            {
                "phase": "Pending",
                "containerStatuses": engine({"waiting": {"reason": "ContainerCreating"}}),
            },
            "",
        ),
    ],
)
def test_trouble_is_named(status: dict[str, Any], reason: str) -> None:
    pod = read_pod(raw_pod(status))
    assert pod is not None
    assert pod.trouble_reason == reason
    assert not pod.started


def test_marks_are_read_however_they_were_written() -> None:
    pod = read_pod(raw_pod({}, draining="2026-11-22T12:00:00+00:00"))
    assert pod is not None
    assert pod.draining_since is not None
    by_hand = read_pod(raw_pod({}, draining="true", cost="cheap"))
    assert by_hand is not None
    assert by_hand.draining_since is not None
    assert by_hand.cost == 0


def test_memlock_is_read_from_the_check() -> None:
    check = {"name": "memlock", "state": {"terminated": {"message": "64\n"}}}
    pod = read_pod(raw_pod({"initContainerStatuses": [check]}))
    assert pod is not None
    assert pod.memlock == "64"


def test_only_our_own_workers_count() -> None:
    def pools(uid: str) -> Pair[PoolView | None]:
        return Pair.build(lambda role: PoolView(f"qwen-{role}", uid, 1, 1, 1))

    assert [pod.orphan for pod in read_workers([raw_pod({})], pools("pool"))] == [False]
    assert read_workers([raw_pod({})], pools("other")) == ()
    assert read_workers([raw_pod({})], Pair(None, None)) == ()
    left = raw_pod({})
    del left["metadata"]["ownerReferences"]
    assert read_workers([left], pools("other")) == (), "somebody else made it"
    left["metadata"]["labels"]["app.kubernetes.io/managed-by"] = "tandem-operator"
    assert [pod.orphan for pod in read_workers([left], pools("other"))] == [True]
    router = raw_pod({})
    router["metadata"]["labels"]["tandem.dev/role"] = "router"
    assert read_pod(router) is None


def test_ready_router_pods_are_found() -> None:
    raw = raw_pod({"podIP": "10.0.0.2", "conditions": [{"type": "Ready", "status": "True"}]})
    assert read_router_pod(raw) is None
    raw["metadata"]["labels"]["tandem.dev/role"] = "router"
    found = read_router_pod(raw)
    assert found is not None
    assert found.ip == "10.0.0.2"


def test_the_routers_have_changed_over_only_without_old_pods() -> None:
    raw: dict[str, Any] = {
        "metadata": {"generation": 2, "labels": {"tandem.dev/revision": "r1"}},
        "spec": {"replicas": 2},
        "status": {
            "observedGeneration": 2,
            "replicas": 2,
            "updatedReplicas": 2,
            "availableReplicas": 2,
            "readyReplicas": 2,
        },
    }
    assert read_router(raw).rolled_out
    for change in (
        {"replicas": 3},
        {"observedGeneration": 1},
        {"updatedReplicas": 1},
        {"terminatingReplicas": 1},
    ):
        assert not read_router({**raw, "status": {**raw["status"], **change}}).rolled_out


def test_nodes_offer_extended_resources() -> None:
    node = {
        "metadata": {"name": "n"},
        "spec": {},
        "status": {
            "conditions": [{"type": "Ready", "status": "True"}],
            "allocatable": {"cpu": "4", "rdma/ib": "8", "rdma/hca": "1k", "hugepages/x": "1Ki"},
        },
    }
    view = read_node(node)
    assert view.schedulable
    assert view.resources == {"rdma/ib": 8, "rdma/hca": 1000, "hugepages/x": 1024}
    assert not read_node({**node, "spec": {"unschedulable": True}}).schedulable


@pytest.mark.parametrize(
    ("text", "networks"),
    [
        ('[{"name": "default"}, {"name": "rdma-0"}]', ("default", "rdma-0")),
        ("[]", ()),
        ("rdma-0", ()),
        ('[{"network": "rdma-0"}]', ()),
        ("null", ()),
    ],
)
def test_nodes_of_gke_name_their_networks(text: str, networks: tuple[str, ...]) -> None:
    notes = {"networking.gke.io/network-status": text}
    assert read_node({"metadata": {"name": "n", "annotations": notes}}).networks == networks


def test_devices_have_the_full_names_of_their_attributes() -> None:
    attributes = {
        "rdma": {"bool": True},
        "ifName": {"string": "gpu0rdma0"},
        "numaNode": {"int": 1},
        "resource.kubernetes.io/pcieRoot": {"string": "pci0000:16"},
        "rails": {"strings": ["a", "b"]},
        "empty": {},
    }
    spec = {
        "nodeName": "node-0",
        "driver": "dra.net",
        "devices": [{"name": "nic", "attributes": attributes}, {"name": "bare"}],
    }
    nic, bare = read_devices({"spec": spec})
    assert (nic.node, nic.driver, nic.name) == ("node-0", "dra.net", "nic")
    assert nic.attributes == {
        "dra.net/rdma": True,
        "dra.net/ifName": "gpu0rdma0",
        "dra.net/numaNode": 1,
        "resource.kubernetes.io/pcieRoot": "pci0000:16",
    }
    assert not bare.attributes
    assert not read_devices({"spec": {"driver": "dra.net", "sharedCounters": []}})


def test_foreign_pools_are_left_alone() -> None:
    pool = {
        "metadata": {
            "name": "qwen-decode",
            "uid": "p",
            "annotations": {"tandem.dev/spec-replicas": "2"},
            "ownerReferences": [{"uid": "me"}],
        },
        "spec": {"replicas": 3, "revision": "r1"},
        "status": {"desiredReplicas": 2},
    }
    views = read_pools("qwen", "me", [pool])
    assert views.prefill is None
    decode = views.decode
    assert decode is not None
    assert (decode.replicas, decode.spec_replicas, decode.desired) == (3, 2, 2)
    assert read_pools("qwen", "other", [pool]) == Pair(None, None)


def test_specs_and_statuses_of_other_releases() -> None:
    spec, error = read_spec({"spec": {"model": {"uri": "mock://x"}, "bogus": 1}})
    assert spec is None
    assert "bogus" in error
    assert read_status({"status": {"bogus": 1}}).conditions == ()


def test_times() -> None:
    assert read_time("2026-11-22T12:00:00Z") is not None
    assert read_time(None) is None
    assert read_time("soon") is None
