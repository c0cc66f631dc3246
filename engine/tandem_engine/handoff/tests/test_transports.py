"""The registry of transports, and that a new one needs no edit elsewhere."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from deadlines import patience

from tandem_engine.frames import ProbeRequest, ProbeResult
from tandem_engine.handoff.errors import HandoffUnavailable
from tandem_engine.handoff.events import (
    FetchCancelled,
    FetchDone,
    FetchFailed,
    PrefillDropped,
    PushFailed,
)
from tandem_engine.handoff.tests.in_memory import InMemoryTransport, Network
from tandem_engine.handoff.tests.scripted import FAST, LAYOUT, BytesStore, eventually, make
from tandem_engine.handoff.tests.sleeping import leave_fences_unanswered
from tandem_engine.handoff.transports import registry
from tandem_engine.handoff.transports.cuda_ipc import CudaIpcTransport
from tandem_engine.handoff.transports.registry import Transports
from tandem_engine.handoff.transports.shm import ShmTransport
from tandem_engine.handoff.transports.tcp import TcpTransport
from tandem_engine.step import KVStore
from tandem_wire.handoff import TransportName


@pytest.fixture(name="planted")
def planted_fixture(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr(InMemoryTransport, "network", network, raising=False)
    others = [kind for kind in registry.BUILT if kind.name != InMemoryTransport.name]
    monkeypatch.setattr(registry, "BUILT", (InMemoryTransport, *others))
    return network


def test_every_built_transport_has_a_name_of_its_own_that_the_wire_knows() -> None:
    names = [transport.name for transport in registry.BUILT]
    assert len(set(names)) == len(names)
    assert set(names) <= set(get_args(TransportName))


@pytest.mark.parametrize("checksum", [True, False])
def test_a_planted_transport_moves_pages(
    stack: ExitStack, planted: Network, checksum: bool
) -> None:
    p, d = make(stack, "p", checksum=checksum), make(stack, "d", checksum=checksum)
    before = d.kv.data.copy()
    d.fetch("r", [p], 40)
    arrived = p.arrived()
    source, target = p.push(arrived, chunks=3), arrived.request.blocks
    done = d.outcome("r")
    assert isinstance(done, FetchDone), done
    assert (done.transport, done.num_bytes) == (
        InMemoryTransport.name,
        len(source) * LAYOUT.block_bytes,
    )
    before[:, :, target] = p.kv.data[:, :, source]
    assert np.array_equal(d.kv.data, before)
    sides = {
        f'kv_sessions{{backend="{InMemoryTransport.name}",side="{side}"}}': 1.0
        for side in ("prefill", "decode")
    }
    eventually(lambda: p.handoff.gauges() | d.handoff.gauges() == sides)


def test_a_probe_goes_over_a_planted_transport(stack: ExitStack, planted: Network) -> None:
    p, d = make(stack, "p"), make(stack, "d")
    before = d.kv.data.copy()
    port = p.handoff.bootstrap_port
    d.handoff.post(ProbeRequest(number=1, host="127.0.0.1", port=port, num_blocks=9))
    result = d.wait(ProbeResult)
    assert (result.transport, result.error) == (InMemoryTransport.name, "")
    assert result.num_bytes == 9 * LAYOUT.block_bytes
    assert np.array_equal(d.kv.data, before)


@pytest.mark.parametrize("faults", ["", "fence:duplicate@#1"])
def test_a_fence_waits_for_the_completion_of_a_one_sided_write(
    stack: ExitStack, planted: Network, faults: str
) -> None:
    """While P may still write D's blocks, D's core doesn't get them back; nor by a second fence."""
    p, d = make(stack, "p"), make(stack, "d", faults=faults)
    assert d.takes(p)
    planted.holds = True
    d.fetch("r", [p])
    p.push(p.arrived(), finish=False)
    assert planted.held.wait(patience(20))
    d.handoff.post(FetchCancelled("r"))
    num_fences = 2 if faults else 1
    eventually(lambda: p.handoff.counters().get("kv_fences_total", 0) == num_fences)
    d.fetch("refused", [p])  # what P says to this comes behind any answer to a fence
    p.handoff.post(PushFailed(p.arrived().key, "no_room", "no pages"))
    assert isinstance(d.outcome("refused"), FetchFailed)
    assert not d.handoff.poll()
    assert d.handoff.num_leases() == 1
    planted.release.set()
    assert isinstance(d.outcome("r"), FetchFailed)
    p.wait(PrefillDropped)
    planted.holds = False
    assert d.takes(p), "the session goes on"
    assert d.handoff.counters()["kv_dials_total"] == 1


def test_a_lease_runs_out_while_a_write_to_another_peer_hangs(
    stack: ExitStack, planted: Network
) -> None:
    """The sweep waits for no write: the second silent peer's push is dropped all the same."""
    options = {"heartbeat_seconds": 60.0, "lease_seconds": 0.3, "stall_seconds": 60.0}
    p = make(stack, "p")
    d, other = make(stack, "d", **options), make(stack, "other", **options)
    assert d.takes(p)
    assert other.takes(p)
    planted.holds = True
    d.fetch("held", [p])
    p.push(p.arrived(), finish=False)
    assert planted.held.wait(patience(20))
    eventually(lambda: p.handoff.counters().get("kv_expired_leases_total", 0) == 1)
    other.fetch("waits", [p])
    waiting = p.arrived()
    assert p.wait(PrefillDropped).key == waiting.key
    assert p.handoff.num_leases() == 1
    planted.release.set()
    p.wait(PrefillDropped)


def test_a_peer_that_does_not_complete_loses_its_right_to_write(
    stack: ExitStack, planted: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut off, and what it writes when it wakes up lands nowhere."""
    p, d = make(stack, "p"), make(stack, "d", stall_seconds=patience(0.3))
    assert d.takes(p)
    leave_fences_unanswered(monkeypatch)
    planted.holds = planted.is_stopped = True
    before = d.kv.data.copy()
    d.fetch("r", [p])
    p.push(p.arrived(), finish=False)
    assert planted.held.wait(patience(20))
    assert isinstance(d.outcome("r"), FetchFailed)
    planted.release.set()
    eventually(lambda: planted.num_refused >= 1)
    p.wait(PrefillDropped)
    assert np.array_equal(d.kv.data, before)


def test_a_peer_without_the_best_transport_gets_the_next(
    stack: ExitStack, planted: Network
) -> None:
    p, d = make(stack, "p", transport="tcp"), make(stack, "d")
    d.fetch("r", [p])
    p.push(p.arrived())
    done = d.outcome("r")
    assert isinstance(done, FetchDone)
    assert done.transport == "tcp"


def test_a_worker_that_can_offer_nothing_says_why(stack: ExitStack, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    p, d = make(stack, "p"), make(stack, "d", transport="shm", shm_dir=nowhere)
    d.fetch("r", [p])
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert "can offer no transport (shm: can't make a ring" in failed.message
    assert nowhere in failed.message


def test_auto_goes_on_without_a_transport_that_can_not_be_offered(
    stack: ExitStack, tmp_path: Path
) -> None:
    p, d = make(stack, "p"), make(stack, "d", shm_dir=str(tmp_path / "nowhere"))
    d.fetch("r", [p])
    p.push(p.arrived())
    done = d.outcome("r")
    assert isinstance(done, FetchDone)
    assert done.transport == "tcp"


def test_a_refusal_says_what_each_offered_transport_lacks(stack: ExitStack, tmp_path: Path) -> None:
    p, d = make(stack, "p"), make(stack, "d", transport="shm", shm_dir=str(tmp_path))
    d.fetch("r", [p])
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert "no common transport (shm: TANDEM_SHM_DIR is not set; set it to" in failed.message
    assert "--transfer Auto" in failed.message


def test_a_transport_that_is_not_built_is_refused_with_the_list_of_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "BUILT", (CudaIpcTransport, ShmTransport, TcpTransport))
    with pytest.raises(HandoffUnavailable) as caught:
        Transports(replace(FAST, transport="nixl"), BytesStore(LAYOUT, 1))
    assert "--transfer is Nixl" in str(caught.value)
    assert "use one of Auto, CudaIpc, Shm, Tcp" in str(caught.value)


def test_memory_is_registered_once_for_all_sessions_and_given_back(
    stack: ExitStack, planted: Network
) -> None:
    p, others = make(stack, "p"), [make(stack, name) for name in ("d1", "d2")]
    for d in others:
        assert d.takes(p)
    assert planted.registered == [worker.kv.regions() for worker in (p, *others)]
    for worker in (p, *others):
        worker.close()
    assert not planted.registered


def test_a_cache_that_can_not_be_registered_goes_over_the_next_transport(
    stack: ExitStack, planted: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BytesStore, "regions", KVStore.regions)
    p, d = make(stack, "p"), make(stack, "d")
    d.fetch("r", [p])
    p.push(p.arrived())
    done = d.outcome("r")
    assert isinstance(done, FetchDone)
    assert done.transport == "tcp"
    assert not planted.registered
    with pytest.raises(HandoffUnavailable, match="can't be registered; use Tcp"):
        make(stack, "x", transport="mooncake")
