"""Which transport a pair uses: the best that moves a page, and every other one with its reason."""

import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from deadlines import patience

from tandem_engine.errors import StagingUnavailableError
from tandem_engine.frames import ProbeRequest, ProbeResult
from tandem_engine.handoff.errors import HandoffUnavailable
from tandem_engine.handoff.events import FetchFailed
from tandem_engine.handoff.service import start_handoff
from tandem_engine.handoff.tests import scripted
from tandem_engine.handoff.tests.host_cache import HostOpenCache, HostPeerCache
from tandem_engine.handoff.tests.scripted import FAST, SharingStore, Worker, eventually, make
from tandem_engine.handoff.tests.transport_list import TRANSPORTS
from tandem_engine.handoff.transports import nixl
from tandem_engine.handoff.transports.base import Link
from tandem_engine.handoff.transports.registry import Transports
from tandem_engine.memory import Gate, Staging

NO_GPU = "this worker's KV cache is not in the memory of one GPU"


@pytest.fixture(name="pair")
def pair_fixture(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Worker, Worker]:
    """P and D, which choose by themselves and can do everything."""
    monkeypatch.setattr(scripted, "BytesStore", SharingStore)
    p, d = make(stack, "p", shm_dir=str(tmp_path)), make(stack, "d", shm_dir=str(tmp_path))
    return p, d


def seen(p: Worker, d: Worker) -> tuple[str, dict[str, str]]:
    """The transport of a fetch, and what D has passed over; both sides agree on the first."""
    assert d.takes(p)
    eventually(lambda: len(d.handoff.pairings()) == len(p.handoff.pairings()) == 1)
    (ours,), (theirs,) = d.handoff.pairings(), p.handoff.pairings()
    assert (ours.side, ours.worker_id) == ("decode", "p")
    assert (theirs.side, theirs.worker_id) == ("prefill", "d")
    assert ours.transport == theirs.transport
    return ours.transport, {str(name): why for name, why in ours.passed_over.items()}


def test_the_best_that_both_can_do(pair: tuple[Worker, Worker]) -> None:
    assert seen(*pair) == ("cudaIpc", {})


def test_a_cache_of_the_host_says_why_it_goes_over_shm(stack: ExitStack, tmp_path: Path) -> None:
    p, d = make(stack, "p", shm_dir=str(tmp_path)), make(stack, "d", shm_dir=str(tmp_path))
    transport, passed_over = seen(p, d)
    assert transport == "shm"
    assert passed_over == {"cudaIpc": NO_GPU, "cudaIpcRing": NO_GPU}


def test_a_transport_that_a_check_rules_out_is_passed_over_for_its_reason(
    stack: ExitStack, tmp_path: Path
) -> None:
    ruled_out = {"shm": "3 MiB are free: make it larger"}
    p = make(stack, "p", shm_dir=str(tmp_path))
    d = make(stack, "d", shm_dir=str(tmp_path), ruled_out=ruled_out)
    transport, passed_over = seen(p, d)
    assert transport != "shm"
    assert passed_over["shm"] == "3 MiB are free: make it larger"
    with pytest.raises(HandoffUnavailable, match="--transfer is Shm, but 3 MiB are free"):
        make(stack, "named", transport="shm", shm_dir=str(tmp_path), ruled_out=ruled_out)


def test_a_transport_that_loses_a_page_is_not_used(
    pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shakes hands well, but what P writes is not what D reads: as a wrong mapping would."""
    put = scripted.MemfdStaging.put

    def lose(self: scripted.MemfdStaging, data: bytes, at: int, seed: int | None) -> int:
        put(self, bytes(len(data)), at, None)
        return 4711

    monkeypatch.setattr(scripted.MemfdStaging, "put", lose)
    put_direct = HostPeerCache.put

    def lose_too(self: HostPeerCache, data: bytes, gate: Gate, seed: int | None) -> int:
        put_direct(self, bytes(len(data)), gate, None)
        return 4711

    monkeypatch.setattr(HostPeerCache, "put", lose_too)
    p, d = pair
    transport, passed_over = seen(p, d)
    assert transport == "shm"
    assert list(passed_over) == ["cudaIpc", "cudaIpcRing"]
    for why in passed_over.values():
        assert "the first page did not come" in why
        assert "pattern changed on its way" in why


def test_a_page_that_never_comes_is_not_waited_for(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P's copy never ends: the next transport is tried long before a stall."""
    monkeypatch.setattr(scripted, "BytesStore", SharingStore)
    release = threading.Event()

    def hang(*_: object) -> int:
        assert release.wait(patience(20))
        return 0

    monkeypatch.setattr(scripted.MemfdStaging, "put", hang)
    monkeypatch.setattr(HostPeerCache, "put", hang)
    options: dict[str, Any] = {"shm_dir": str(tmp_path), "stall_seconds": 0.5}
    p, d = make(stack, "p", **options), make(stack, "d", dial_seconds=1.5, **options)
    try:
        assert d.takes(p)
    finally:
        release.set()
    transport, passed_over = seen(p, d)
    assert transport == "shm"
    assert "no progress for 0.5 s" in passed_over["cudaIpc"]


@pytest.mark.parametrize("side", ["p", "d"])
def test_what_can_not_be_mapped_or_made_is_the_reason(
    pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    p, d = pair

    def refuse(*_: object) -> Staging:
        raise StagingUnavailableError("CUDA_ERROR_INVALID_DEVICE (101)")

    if side == "p":
        monkeypatch.setattr(p.kv, "map_cache", refuse)
        monkeypatch.setattr(p.kv, "map_staging", refuse)
    else:
        monkeypatch.setattr(HostOpenCache, "descriptors", refuse)
        monkeypatch.setattr(d.kv, "make_staging", refuse)
    transport, passed_over = seen(p, d)
    assert transport == "shm"
    shares = "the peer can't share its memory"
    told = ("can't map the peer's cache", "can't map the peer's memory")
    for name, reason in zip(("cudaIpc", "cudaIpcRing"), told, strict=True):
        what = reason if side == "p" else shares
        assert passed_over[name] == f"{what}: CUDA_ERROR_INVALID_DEVICE (101)"


def test_every_better_transport_has_its_reason(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of two hosts: neither memory is shared."""
    monkeypatch.setattr(scripted, "BytesStore", SharingStore)
    monkeypatch.setattr(nixl, "RDMA_DIRECTORY", tmp_path)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    p, d = (
        make(stack, name, shm_dir=str(folder)) for name, folder in zip("pd", folders, strict=True)
    )
    transport, passed_over = seen(p, d)
    assert transport == "tcp"
    assert list(passed_over) == ["cudaIpc", "cudaIpcRing", "shm", "nixl"]
    assert "can't reach the peer's socket" in passed_over["cudaIpc"]
    assert "can't map the peer's ring" in passed_over["shm"]
    assert "there is no RDMA device in" in passed_over["nixl"]
    assert not [file for folder in folders for file in folder.iterdir()]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_peer_that_leaves_during_the_handshake_leaves_nothing_behind(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """P finds its transport only after D has gone: no session, no thread, no mapping stays."""
    options: dict[str, Any] = {"transport": transport, "shm_dir": str(tmp_path)}
    p, d = make(stack, "p", **options), make(stack, "d", dial_seconds=patience(0.3), **options)
    accept, ended = Transports.accept, threading.Event()

    async def late(self: Transports, offers: Any, link: Link) -> Any:
        found = await accept(self, offers, link)
        await link.connection.wait_closed()
        ended.set()
        return found

    monkeypatch.setattr(Transports, "accept", late)
    d.fetch("r", [p])
    assert isinstance(d.outcome("r"), FetchFailed)
    assert ended.wait(patience(20))
    monkeypatch.undo()
    d.close()
    eventually(lambda: not p.handoff._prefill._sessions)
    eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("kv-out")])
    assert "memfd:ring" not in Path("/proc/self/maps").read_text()


def test_a_probe_says_what_was_passed_over(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl, "RDMA_DIRECTORY", tmp_path)
    p, d = make(stack, "p"), make(stack, "d", shm_dir=str(tmp_path))
    port = p.handoff.bootstrap_port
    d.handoff.post(ProbeRequest(number=1, host="127.0.0.1", port=port, num_blocks=2))
    result = d.wait(ProbeResult)
    assert (result.transport, result.error) == ("tcp", "")
    assert list(result.passed_over) == ["cudaIpc", "cudaIpcRing", "shm", "nixl"]
    assert "TANDEM_SHM_DIR is not set" in result.passed_over["shm"]
    # No directory would help here.
    assert result.passed_over["cudaIpc"] == NO_GPU
    named = replace(FAST, transport="cudaIpc")
    with pytest.raises(HandoffUnavailable, match=f"--transfer is CudaIpc, but {NO_GPU}"):
        start_handoff(named, p.kv, "h")


def test_a_named_transport_that_does_not_work_is_not_replaced(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"transport": "cudaIpc", "shm_dir": str(tmp_path)}
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    monkeypatch.setattr(scripted.MemfdStaging, "get", lambda *_: (b"", 0))
    monkeypatch.setattr(HostPeerCache, "put", lambda *_: 0)
    d.fetch("r", [p])
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert "can offer no transport (cudaIpc: the first page did not come" in failed.message


def test_auto_takes_nixl_where_there_is_an_rdma_device(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between hosts; what UCX then takes is its own business: TCP on this machine."""
    (tmp_path / "uverbs0").touch()
    monkeypatch.setattr(nixl, "RDMA_DIRECTORY", tmp_path)
    p, d = make(stack, "p"), make(stack, "d")
    transport, passed_over = seen(p, d)
    assert (transport, list(passed_over)) == ("nixl", ["cudaIpc", "cudaIpcRing", "shm"])


def test_without_the_package_auto_goes_on_and_nixl_says_how_to_get_it(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "uverbs0").touch()
    monkeypatch.setattr(nixl, "RDMA_DIRECTORY", tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0].startswith("nixl")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("nixl", "nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, name, None)
    p, d = make(stack, "p"), make(stack, "d")
    transport, passed_over = seen(p, d)
    why = "nixl is not installed; pip install 'tandem-inference[nixl]'"
    assert (transport, passed_over["nixl"]) == ("tcp", why)
    with pytest.raises(HandoffUnavailable) as caught:
        make(stack, "x", transport="nixl")
    assert str(caught.value) == f"--transfer is Nixl, but {why}"
