"""A worker is killed in the middle of a write: what the other one does. Real processes, SIGKILL."""

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deadlines import patience

from tandem_engine.handoff.events import FetchDone, PrefillArrived, PrefillDropped, PushDone
from tandem_engine.handoff.tests.children import Pipe, Start
from tandem_engine.handoff.tests.scripted import Worker, eventually, make
from tandem_engine.handoff.tests.transport_list import RINGS
from tandem_engine.handoff.transports.mooncake import MooncakeOutbound
from tandem_engine.handoff.transports.nixl import NixlOutbound
from tandem_engine.handoff.transports.remote_ring import RemoteRingOutbound
from tandem_engine.handoff.transports.ring import HostStaging
from tandem_wire.messages import PrefillPeer


def die_in_a_write(transport: str, num_put: int) -> None:
    """From now on a write to a ring ends the process after so many bytes of it."""

    def stage(
        self: HostStaging, blocks: Sequence[int], layers: range, at: int, seed: int | None
    ) -> int:
        packed = bytes(self._kv.export_blocks(blocks, layers))
        with self._view(at, len(packed)) as payload:
            payload[:num_put] = packed[:num_put]
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    remote: dict[str, type[RemoteRingOutbound]] = {
        "nixl": NixlOutbound, "mooncake": MooncakeOutbound
    }  # fmt: skip
    if transport in remote:
        kind = remote[transport]
        put = kind._put

        def put_a_part(self: RemoteRingOutbound, source: int, target: int, num_bytes: int) -> None:
            if num_put:
                put(self, source, target, min(num_put, num_bytes))
            os.kill(os.getpid(), signal.SIGKILL)

        kind._put = put_a_part  # type: ignore[method-assign]
    else:
        HostStaging.stage = stage  # type: ignore[method-assign]


def die_in_a_read() -> None:
    """From now on the first page that is taken out of a ring ends the process."""

    def unstage(*_: object) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    HostStaging.unstage = unstage  # type: ignore[method-assign,assignment]


def be_prefill(pipe: Pipe, num_bytes: int, options: dict[str, Any]) -> None:
    """Push what is asked for; die in the second push."""
    worker = Worker("child", **options)
    pipe.send(worker.peer)
    worker.push(worker.arrived())
    arrived = worker.arrived()
    die_in_a_write(options["transport"], num_bytes)
    worker.push(arrived)
    threading.Event().wait()


def be_decode(pipe: Pipe, peer: PrefillPeer, options: dict[str, Any]) -> None:
    """Fetch once; die when the second fetch's first page is there."""
    worker = Worker("child", **options)
    stand_in: Any = type("P", (), {"peer": peer})()
    worker.fetch("first", [stand_in])
    worker.outcome("first")
    die_in_a_read()
    worker.fetch("second", [stand_in], 40)
    threading.Event().wait()


@pytest.fixture(name="options", params=RINGS)
def options_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {"transport": request.param, "shm_dir": str(tmp_path)}


@pytest.mark.parametrize("num_bytes", [0, 1, 383, 768])
def test_the_sender_dies(
    stack: ExitStack, start: Start, options: dict[str, Any], num_bytes: int
) -> None:
    """Before the first byte, in the middle, after the last: the next peer's pages are all there."""
    good, d = make(stack, "good", **options), make(stack, "d", **options)
    pipe = start(be_prefill, num_bytes, options)
    assert pipe.poll(patience(30))
    child: Any = type("P", (), {"peer": pipe.recv()})()
    d.fetch("first", [child])
    first = d.outcome("first")
    assert isinstance(first, FetchDone)
    before = d.kv.data.copy()
    d.fetch("second", [child, good], 40)
    arrived = good.arrived()
    source = good.push(arrived)
    done = d.outcome("second")
    assert isinstance(done, FetchDone)
    assert done.worker_id == "good"
    before[:, :, arrived.request.blocks] = good.kv.data[:, :, source]
    assert np.array_equal(d.kv.data, before)
    assert not list(Path(options["shm_dir"]).iterdir())


def test_the_receiver_dies_and_comes_back(
    stack: ExitStack, start: Start, options: dict[str, Any]
) -> None:
    """Its leases are freed at once, its ring is unmapped, and the next one is served."""
    p = make(stack, "p", **options)
    start(be_decode, p.peer, options)
    p.push(p.arrived())
    second = p.wait(PrefillArrived)
    p.push(second)
    ended = p.wait_until(lambda event: getattr(event, "key", "") == second.key)
    assert isinstance(ended, PushDone | PrefillDropped)
    eventually(lambda: not p.handoff.pairings())
    assert p.handoff.num_leases() == 0
    lines = Path("/proc/self/maps").read_text().splitlines()
    rings = [line for line in lines if "tandem-ring" in line or "memfd:ring" in line]
    # What P's own library may still read after a write that failed stays mapped.
    assert len(rings) <= (options["transport"] == "nixl")
    d = make(stack, "d", **options)
    assert d.takes(p)
    assert not list(Path(options["shm_dir"]).iterdir())
