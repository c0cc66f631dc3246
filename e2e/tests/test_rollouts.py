"""Roll-outs on a cluster whose devices are all in use, under an open-loop load.

Four workers of four devices each take all sixteen. One may be missing at a time, none be added.
"""

import asyncio
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
import pytest
from deadlines import patience

from tests.service import Service, is_ready, mock_manifest
from tests.streams import Stream, completion, run_stream
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

DEVICES = {"resources": {"limits": {"rdma/ib": "4"}}}
NUM_TOKENS = 20
ROLES = ("prefill", "decode")


@pytest.fixture(scope="module")
def full(tandem: Any) -> Iterator[Service]:
    manifest = mock_manifest(
        "full",
        prefill=2,
        decode=2,
        profile="tiny?decode_ms=20&prefill_ms=20",
        rollout={"maxSurge": 0, "maxUnavailable": 1},
    )
    for role in ROLES:
        manifest["spec"][role].update(DEVICES)
    with Service.running(tandem, manifest) as service:
        yield service


@dataclass
class Watched:
    """What was seen during a roll-out: streams, and how many workers held devices at a time."""

    streams: list[Stream] = field(default_factory=list)
    most: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    revisions: dict[str, str] = field(default_factory=dict)  # by the pod's name
    holding: set[tuple[str, str]] = field(default_factory=set)

    def take(self, event: dict[str, Any]) -> None:
        """One event of the watch: a pod holds its devices until it has ended or is gone."""
        pod = event["object"]
        labels, name = pod["metadata"]["labels"], pod["metadata"]["name"]
        key = (labels["tandem.dev/role"], name)
        self.revisions[name] = labels.get("tandem.dev/revision", "")
        ended = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
        if event["type"] == "DELETED" or ended:
            self.holding.discard(key)
        else:
            self.holding.add(key)
        for role in self.most:
            number = sum(held == role for held, _ in self.holding)
            self.most[role] = max(self.most[role], number)


@contextmanager
def watched(service: Service) -> Iterator[Watched]:
    """An open-loop client and a watch of the pods; the bounds are checked when the block ends."""
    stop, seen = threading.Event(), Watched()
    with subprocess.Popen(
        service.cluster.kubectl_argv(
            *("get", "pods", "-n", service.namespace, "-l", f"tandem.dev/service={service.name}"),
            *("--watch", "--output-watch-events", "-o", "json"),
        ),
        env=service.cluster.environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as watch:
        threads = [
            threading.Thread(target=_follow, args=(watch, seen)),
            threading.Thread(target=lambda: asyncio.run(_load(service, seen, stop))),
        ]
        for thread in threads:
            thread.start()
        try:
            wait_for("requests are answered", lambda: len(seen.streams) > 3)
            wait_for("the watch has begun", lambda: all(seen.most.values()))
            yield seen
        finally:
            stop.set()
            threads[1].join()
            watch.terminate()
            threads[0].join()
    assert [stream.error for stream in seen.streams if stream.error] == []
    assert {len(stream.tokens) for stream in seen.streams} == {NUM_TOKENS}
    assert max(seen.most.values()) <= 2, f"above replicas + maxSurge: {seen.most}"
    for stream in seen.streams:
        revisions = {seen.revisions[name] for name in stream.workers if name}
        assert len(revisions) == 1 or stream.failovers, f"KV crossed revisions: {stream.workers}"


def _follow(watch: "subprocess.Popen[str]", seen: Watched) -> None:
    assert watch.stdout is not None, "it is a pipe"
    decoder, text = json.JSONDecoder(), ""
    for line in watch.stdout:
        text = (text + line).lstrip()
        try:
            event, end = decoder.raw_decode(text)
        except ValueError:
            continue  # the rest of it comes with the next lines
        text = text[end:]
        seen.take(event)


async def _load(service: Service, seen: Watched, stop: threading.Event) -> None:
    """A request every quarter of a second, whatever becomes of those before."""
    url = service.url
    running: set[asyncio.Task[Stream]] = set()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=patience(120), limits=limits) as client:
        for number in count():
            if stop.is_set():
                break
            body = completion(service.name, f"request {number}", NUM_TOKENS)
            task = asyncio.create_task(run_stream(client, url, body))
            running.add(task)
            task.add_done_callback(lambda done: seen.streams.append(done.result()))
            await asyncio.sleep(0.25)
        await asyncio.gather(*running)


def edit(service: Service, **engine: Any) -> None:
    patch = json.dumps({"spec": {"engine": engine}})
    service.kubectl("patch", "tisvc", service.name, "--type=merge", "-p", patch)


def settled_at(service: Service, revision: str, *, same: bool) -> bool:
    """Whether all workers are ready and of this revision, or all of one other revision."""
    pods = [pod for role in ROLES for pod in service.pods(role)]
    revisions = {pod["metadata"]["labels"]["tandem.dev/revision"] for pod in pods}
    return (
        len(pods) == 4
        and len(revisions) == 1
        and (revision in revisions) is same
        and all(map(is_ready, pods))
    )


def test_an_edit_rolls_out_without_a_free_device(full: Service) -> None:
    before = full.get()["status"]["revision"]
    with watched(full):
        edit(full, env=[{"name": "EXAMPLE", "value": "1"}])
        wait_for("it has rolled out", lambda: settled_at(full, before, same=False), 240)
        full.wait_ready()
    assert full.get()["status"]["revision"] != before


def test_a_roll_back_after_a_decode_worker_died(full: Service) -> None:
    before = full.get()["status"]["revision"]
    with watched(full):
        edit(full, image="registry.invalid/none:1")

        def stuck() -> bool:
            pods = [pod for role in ROLES for pod in full.pods(role)]
            revisions = [str(p["metadata"]["labels"]["tandem.dev/revision"]) for p in pods]
            return len(revisions) - revisions.count(before) == 2

        wait_for("workers that can't start hold places", stuck, 120)
        old = [
            pod
            for pod in full.pods("decode")
            if pod["metadata"]["labels"]["tandem.dev/revision"] == before
        ]
        full.kubectl(
            "delete", "pod", old[0]["metadata"]["name"], "--grace-period=1", "--wait=false"
        )
        edit(full, image=None)
        wait_for("it has rolled back", lambda: settled_at(full, before, same=True), 240)
        full.wait_ready()
    assert full.get()["status"]["revision"] == before
