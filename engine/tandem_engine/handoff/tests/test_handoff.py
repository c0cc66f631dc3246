"""The hand-off between two services in one process: what arrives, and what may not."""

import mmap
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deadlines import patience

from tandem_engine.handoff.errors import HandoffUnavailable
from tandem_engine.handoff.events import (
    FetchCancelled,
    FetchDone,
    FetchFailed,
    FetchRequest,
    PrefillDropped,
    PushDone,
    PushFailed,
)
from tandem_engine.handoff.prefill.side import PrefillSide
from tandem_engine.handoff.tests.scripted import (
    LATENTS,
    LAYOUT,
    Worker,
    eventually,
    make,
)
from tandem_engine.handoff.tests.sleeping import leave_fences_unanswered
from tandem_engine.handoff.tests.transport_list import TRANSPORTS
from tandem_engine.handoff.transports.base import Inbound
from tandem_engine.step import KVStore
from tandem_wire.messages import SamplingParams


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("write_bytes", [1, 2 * LAYOUT.block_bytes // LAYOUT.num_layers, 10**6])
@pytest.mark.parametrize("layout", [LAYOUT, LATENTS])
def test_pages_arrive(
    stack: ExitStack, tmp_path: Path, transport: str, checksum: bool, write_bytes: int, layout: Any
) -> None:
    """Writes of one layer, of layer groups, of many blocks."""
    options = {
        "transport": transport,
        "shm_dir": str(tmp_path),
        "checksum": checksum,
        "write_bytes": write_bytes,
        "layout": layout,
    }
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    before = d.kv.data.copy()
    for number, (tokens, skip) in enumerate([(10, 0), (1, 0), (90, 8), (8, 4)]):
        d.fetch(f"r{number}", [p], tokens, skip)
        arrived = p.arrived()
        source = p.push(arrived, chunks=3)
        done = d.outcome(f"r{number}")
        assert isinstance(done, FetchDone), done
        assert (done.first_token, done.worker_id) == (77, "p")
        assert done.num_bytes == len(source) * p.kv.layout.block_bytes
        target = arrived.request.blocks
        assert np.array_equal(d.kv.data[:, :, target], p.kv.data[:, :, source])
        before[:, :, target] = d.kv.data[:, :, target]
        p.wait(PushDone)
    assert np.array_equal(d.kv.data, before), "a block was written that no one asked for"
    assert p.handoff.num_leases() == d.handoff.num_leases() == 0
    assert not list(tmp_path.iterdir())


def test_writes_are_no_larger_than_the_receivers_slots(stack: ExitStack, tmp_path: Path) -> None:
    """Stores differ in the size of write that suits them: a GPU's is larger than a CPU's."""
    options: dict[str, Any] = {"transport": "shm", "shm_dir": str(tmp_path), "write_bytes": 0}
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    p.kv.write_bytes, d.kv.write_bytes = 100 * LAYOUT.block_bytes, 2 * LAYOUT.block_bytes
    d.fetch("r", [p], 90)
    arrived = p.arrived()
    source = p.push(arrived)
    assert isinstance(d.outcome("r"), FetchDone)
    assert np.array_equal(d.kv.data[:, :, arrived.request.blocks], p.kv.data[:, :, source])


def test_blocks_are_reserved_when_they_are_asked_for(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: list[tuple[int, ...]] = []
    p, d = make(stack, "p"), make(stack, "d")
    monkeypatch.setattr(d.kv, "reserve", reserved.append)
    d.fetch("r", [p], 10)
    assert len(reserved) == 1
    arrived = p.arrived()
    assert list(reserved[0]) == list(arrived.request.blocks)
    p.push(arrived)
    assert isinstance(d.outcome("r"), FetchDone)


def test_a_ring_is_pinned_while_it_is_used(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[int] = []

    def pin(kv: KVStore, buffer: memoryview) -> Callable[[], None]:
        pinned.append(buffer.nbytes)
        return lambda: pinned.remove(nbytes)

    nbytes = mmap.PAGESIZE + 8 * LAYOUT.block_bytes
    monkeypatch.setattr(KVStore, "pin", pin)
    options = {"transport": "shm", "shm_dir": str(tmp_path)}
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    d.fetch("r", [p])
    p.push(p.arrived())
    assert isinstance(d.outcome("r"), FetchDone)
    assert pinned == [nbytes, nbytes]
    d.close()
    eventually(lambda: not pinned)


def test_next_peer_after_a_refusal_by_the_core(stack: ExitStack) -> None:
    p1, p2, d = make(stack, "p1"), make(stack, "p2"), make(stack, "d")
    d.fetch("r", [p1, p2])
    p1.handoff.post(PushFailed(p1.arrived().key, "no_room", "no pages"))
    p1.wait(PushDone)
    p2.push(p2.arrived())
    done = d.outcome("r")
    assert isinstance(done, FetchDone)
    assert done.worker_id == "p2"


def test_failure_when_no_peer_delivers(stack: ExitStack) -> None:
    p, d = make(stack, "p"), make(stack, "d")
    gone = make(stack, "gone")
    gone.close()
    d.fetch("r", [gone, p])
    p.handoff.post(PushFailed(p.arrived().key, "too_long", "no way"))
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert "gone" in failed.message
    assert "too_long: no way" in failed.message
    d.fetch("none", [])
    assert isinstance(d.outcome("none"), FetchFailed)


def test_a_closed_worker_fails_its_fetches_and_drops_its_pushes(stack: ExitStack) -> None:
    p, d = make(stack, "p"), Worker("d")
    d.fetch("r", [p])
    arrived = p.arrived()
    p.push(arrived, finish=False)
    d.close()
    assert isinstance(d.outcome("r"), FetchFailed)
    assert p.wait(PrefillDropped).key == arrived.key
    assert p.handoff.num_leases() == d.handoff.num_leases() == 0
    p.handoff.post(PushFailed(arrived.key, "internal", "late news of a dropped push"))
    p.close()
    p.handoff.post(PushFailed(arrived.key, "internal", "news after the end"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_flipped_byte_is_caught(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    options = {"transport": transport, "shm_dir": str(tmp_path)}
    bad, good, d = (make(stack, name, **options) for name in ("bad", "good", "d"))
    d.kv.is_seen_in_place = False  # see `test_in_place.py`
    land, land_staged, check = Inbound._land, Inbound._land_staged, Inbound._check

    def corrupt(self: Inbound, epoch: int, *rest: Any) -> None:
        rest[-1][3] ^= epoch == 1
        land(self, epoch, *rest)

    def corrupt_staged(self: Inbound, epoch: int, *rest: Any) -> None:
        staging, at = rest[-2:]
        with staging._view(at, 4) as payload:
            payload[3] ^= epoch == 1
        land_staged(self, epoch, *rest)

    def corrupt_in_place(self: Inbound, epoch: int, blocks: Sequence[int], *rest: Any) -> None:
        d.kv.data[0, 0, blocks[0], 3] ^= epoch == 1
        check(self, epoch, blocks, *rest)

    monkeypatch.setattr(Inbound, "_check", corrupt_in_place)
    monkeypatch.setattr(Inbound, "_land", corrupt)
    monkeypatch.setattr(Inbound, "_land_staged", corrupt_staged)
    d.fetch("r", [bad, good], 40)
    bad.push(bad.arrived())
    arrived = good.arrived()
    source = good.push(arrived)
    done = d.outcome("r")
    assert isinstance(done, FetchDone)
    assert done.worker_id == "good"
    assert d.handoff.counters()["kv_checksum_errors_total"] == 1
    target = arrived.request.blocks
    assert np.array_equal(d.kv.data[:, :, target], good.kv.data[:, :, source])


def test_a_stale_write_is_dropped(
    stack: ExitStack, over: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of a fenced epoch that are still on their way land nowhere."""
    p, d = make(stack, "p", **over), make(stack, "d", **over)
    d.kv.is_seen_in_place = False  # see `test_in_place.py`
    release, held = threading.Event(), threading.Event()

    def hold(way: str) -> None:
        land = getattr(Inbound, way)

        def wait(self: Inbound, epoch: int, *rest: Any) -> None:
            if epoch == 1:
                held.set()
                assert release.wait(patience(20))
            land(self, epoch, *rest)

        monkeypatch.setattr(Inbound, way, wait)

    hold("_land")
    hold("_land_staged")
    hold("_check")
    before = d.kv.data.copy()
    d.fetch("r", [p])
    arrived = p.arrived()
    p.push(arrived, finish=False)
    assert held.wait(patience(20))
    d.handoff.post(FetchCancelled("r"))
    assert isinstance(d.outcome("r"), FetchFailed)
    p.wait(PrefillDropped, lambda event: event.key == arrived.key)
    release.set()
    d.fetch("again", [p], 40)
    target = p.arrived()
    source = p.push(target)
    assert isinstance(d.outcome("again"), FetchDone)
    blocks = target.request.blocks
    before[:, :, blocks] = p.kv.data[:, :, source]
    assert np.array_equal(d.kv.data, before)
    eventually(lambda: d.handoff.counters()["kv_stale_writes_total"] >= 1)


def test_a_stall_is_given_up_and_fenced(stack: ExitStack, over: dict[str, Any]) -> None:
    p1, p2 = make(stack, "p1", **over), make(stack, "p2", **over)
    d = make(stack, "d", stall_seconds=patience(0.3), **over)
    d.fetch("r", [p1, p2])
    arrived = p1.arrived()
    p1.push(arrived, finish=False)
    assert p1.wait(PrefillDropped).key == arrived.key
    p2.push(p2.arrived())
    done = d.outcome("r")
    assert isinstance(done, FetchDone)
    assert done.worker_id == "p2"
    assert p1.handoff.counters()["kv_fences_total"] == 1


def test_a_lease_runs_out_without_heartbeats(stack: ExitStack, over: dict[str, Any]) -> None:
    """D keeps its connection but goes silent: P's tick frees the pages."""
    p = make(stack, "p", **over)
    d = make(stack, "d", heartbeat_seconds=5.0, lease_seconds=0.3, **over)
    d.fetch("r", [p])
    arrived = p.arrived()
    p.push(arrived, finish=False)
    assert p.wait(PrefillDropped).key == arrived.key
    assert p.handoff.counters()["kv_expired_leases_total"] == 1
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert "lease" in failed.message


def test_pages_of_other_requests_are_out_of_reach(stack: ExitStack) -> None:
    """A write to blocks that the request doesn't own fails the attempt and changes nothing."""
    p, d = make(stack, "p"), make(stack, "d")
    before = d.kv.data.copy()
    d.fetch("r", [p], 8)
    arrived = p.arrived()
    arrived.request.blocks[:] = [50, 51]
    p.push(arrived)
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert "do not belong to this request" in failed.message
    assert np.array_equal(d.kv.data, before)


def test_many_at_once(stack: ExitStack, over: dict[str, Any]) -> None:
    p, d = make(stack, "p", **over), make(stack, "d", **over)
    for number in range(40):
        d.fetch(f"r{number}", [p], 9)
    for _ in range(40):
        p.push(p.arrived())
    for number in range(40):
        assert isinstance(d.outcome(f"r{number}"), FetchDone)
    assert d.handoff.counters()["kv_dials_total"] == 1


def test_what_can_not_start_says_so(stack: ExitStack) -> None:
    p = make(stack, "p")
    for changes, message in (
        ({"bootstrap_port": p.handoff.bootstrap_port}, "--bootstrap-port"),
        ({"transport": "shm"}, "TANDEM_SHM_DIR"),
    ):
        with pytest.raises(HandoffUnavailable, match=message):
            Worker("x", **changes)


def test_senseless_prefills_are_refused(stack: ExitStack) -> None:
    p, d = make(stack, "p"), make(stack, "d")
    d.handoff.post(
        FetchRequest(
            rid="r",
            tokens=(1, 2, 3),
            num_prompt_tokens=3,
            num_skip_tokens=0,
            blocks=(1, 2, 3),
            params=SamplingParams(max_tokens=1),
            peers=(p.peer,),
        )
    )
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert "invalid" in failed.message


def test_a_failed_write_reaches_the_decode_side_as_an_error(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = make(stack, "p"), make(stack, "d")

    def broken(*_: object) -> bytes:
        raise RuntimeError("the cache is gone")

    monkeypatch.setattr(p.kv, "export_blocks", broken)
    monkeypatch.setattr(p.kv, "views", broken)
    d.fetch("r", [p])
    p.push(p.arrived())
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert "the cache is gone" in failed.message
    p.wait(PushDone)
    monkeypatch.undo()
    assert d.takes(p)


def test_a_peer_that_does_not_fence_is_cut_off(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It beats, but never acknowledges: the end of its connection stands in for that."""
    p1, p2, d = make(stack, "p1"), make(stack, "p2"), make(stack, "d", stall_seconds=patience(0.3))
    leave_fences_unanswered(monkeypatch)
    d.fetch("r", [p1, p2])
    p1.push(p1.arrived(), finish=False)
    p2.push(p2.arrived())
    done = d.outcome("r")
    assert isinstance(done, FetchDone)
    assert done.worker_id == "p2"
    p1.wait(PrefillDropped)


def test_the_death_of_the_thread_is_the_cores_death(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = make(stack, "p")

    async def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(PrefillSide, "sweep", broken)
    p.wake.wait(patience(20))
    with pytest.raises(RuntimeError, match="a bug"):
        p.handoff.poll()
