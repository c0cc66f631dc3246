"""Changes under load: scale, edit, delete a pod, new model, new image, delete the service.

Each one converges without a failed request; after deletion nothing is left.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.service import Service, is_ready, mock_manifest
from tests.streams import Stream, completion, run_streams
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NUM_TOKENS = 40


@pytest.fixture(scope="module")
def changing(tandem: Any) -> Iterator[Service]:
    manifest = mock_manifest(
        "changing", prefill=1, decode=2, profile="tiny?decode_ms=30&prefill_ms=20"
    )
    with Service.running(tandem, manifest) as service:
        yield service


@contextmanager
def under_load(service: Service) -> Iterator[None]:
    """A steady trickle of streams; every one must have ended well when the block ends."""
    stop = threading.Event()
    seen: list[Stream] = []

    def load() -> None:
        while not stop.is_set():
            bodies = [completion(service.name, f"load {i}", NUM_TOKENS) for i in range(4)]
            seen.extend(asyncio.run(run_streams(service.url, bodies)))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert seen
    assert [s.error for s in seen if s.error] == []
    assert {len(s.tokens) for s in seen} == {NUM_TOKENS}


def test_kubectl_scale(changing: Service) -> None:
    with under_load(changing):
        changing.kubectl("scale", "tpool/changing-decode", "--replicas=3")
        changing.wait_pool("Decode", 3)
        changing.kubectl("scale", "tpool/changing-decode", "--replicas=1")
        changing.wait_pool("Decode", 1)
    changing.kubectl("scale", "tpool/changing-decode", "--replicas=2")
    changing.wait_pool("Decode", 2)


def test_edit_replicas(changing: Service) -> None:
    with under_load(changing):
        patch = json.dumps({"spec": {"prefill": {"replicas": 2}}})
        changing.kubectl("patch", "tisvc", "changing", "--type=merge", "-p", patch)
        changing.wait_pool("Prefill", 2)


def test_delete_a_pod_by_hand(changing: Service) -> None:
    with under_load(changing):
        before = changing.pods("decode")
        changing.kubectl("delete", "pod", before[0]["metadata"]["name"], "--wait=false")
        gone = before[0]["metadata"]["uid"]

        def replaced() -> bool:
            pods = changing.pods("decode")
            uids = {pod["metadata"]["uid"] for pod in pods}
            return gone not in uids and sum(map(is_ready, pods)) == 2

        wait_for("the pod is replaced", replaced, 120)


@pytest.mark.parametrize(
    "patch",
    [
        {"spec": {"engine": {"image": "ghcr.io/tandem-inference/tandem-engine:0.1.0-next"}}},
        {
            "spec": {
                "model": {"uri": "mock://tiny?decode_ms=20&prefill_ms=20", "revision": "second"}
            }
        },
    ],
    ids=["image", "model"],
)
def test_a_new_revision_rolls_out(changing: Service, patch: dict[str, Any]) -> None:
    before = changing.get()["status"]["revision"]
    with under_load(changing):
        changing.kubectl("patch", "tisvc", "changing", "--type=merge", "-p", json.dumps(patch))

        def rolled() -> bool:
            pods = changing.pods("prefill") + changing.pods("decode")
            revisions = {p["metadata"]["labels"]["tandem.dev/revision"] for p in pods}
            return len(revisions) == 1 and before not in revisions and all(map(is_ready, pods))

        wait_for("only the new revision is left", rolled, 180)
        changing.wait_ready()


def test_delete_finishes_streams_and_leaves_nothing(tandem: Any) -> None:
    # 18 seconds of tokens: rollout.drainSeconds holds, and nothing ends them earlier.
    manifest = mock_manifest("leaving", decode=1, profile="tiny?decode_ms=30&prefill_ms=20")
    service = Service.apply(tandem, manifest).wait_ready()
    streams: list[Stream] = []

    def load() -> None:
        bodies = [completion(service.name, f"last {i}", 600) for i in range(8)]
        streams.extend(asyncio.run(run_streams(service.url, bodies)))

    thread = threading.Thread(target=load)
    thread.start()
    workers = [pod for role in ("prefill", "decode") for pod in service.pods(role)]
    wait_for(
        "the streams run",
        lambda: sum(service.worker_state(pod)["load"]["num_running"] for pod in workers) >= 8,
    )
    service.kubectl("delete", "tisvc", "leaving", "--wait=false")
    kinds = "tisvc,pods,services,deployments,tpool,serviceaccounts,roles,rolebindings,"
    kinds += "networkpolicies,poddisruptionbudgets,controllerrevisions,configmaps,endpointslices"

    def nothing() -> bool:
        left = service.kubectl("get", kinds, "-l", "tandem.dev/service=leaving", "-o", "name")
        return not left.strip() and not service.get()

    wait_for("nothing of it is left", nothing, 60)
    thread.join()
    assert [stream.error for stream in streams] == [""] * 8
    assert {len(stream.tokens) for stream in streams} == {600}
