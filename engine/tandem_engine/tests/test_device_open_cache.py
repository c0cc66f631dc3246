"""A cache of a GPU that other processes write to, through gates. Runs with `-m gpu`."""

import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

import pytest
import torch
from deadlines import patience

from tandem_engine.errors import GateShutError
from tandem_engine.handoff.tests.conftest import stack_fixture
from tandem_engine.handoff.tests.test_open_cache import (
    test_a_gate_is_used_again_by_the_next_generation,
    test_a_writer_that_wakes_after_it_was_cut_off_is_not_let_in,
    test_pages_that_a_step_still_writes_are_not_given_to_the_peer,
    test_without_news_of_a_peers_end_pages_go_through_the_ring,
)
from tandem_engine.memory import Gate, OpenCache, PeerCache
from tandem_engine.runner.device_kv import DeviceKVStore
from tandem_engine.tests.test_device_handoff import on_gpus
from tandem_engine.tests.test_device_kv import HEADS, LATENTS
from tandem_kernels.checksum.reference import checksum
from tandem_kernels.page_push import kernel
from tandem_wire.handoff import KVLayout

pytestmark = pytest.mark.gpu

__all__ = [
    "on_gpus",
    "stack_fixture",
    "test_a_gate_is_used_again_by_the_next_generation",
    "test_a_writer_that_wakes_after_it_was_cut_off_is_not_let_in",
    "test_pages_that_a_step_still_writes_are_not_given_to_the_peer",
    "test_without_news_of_a_peers_end_pages_go_through_the_ring",
]

NUM_BLOCKS = 40
LARGE = KVLayout(
    num_layers=32, num_kv_heads=8, head_dim=128, page_size=64, dtype="bfloat16", itemsize=2
)
SLOW_BLOCKS = list(range(32))
"""Of the large layout: one program alone takes tens of milliseconds for them."""


@pytest.fixture(name="options")
def options_fixture(tmp_path: Path) -> dict[str, Any]:
    return {"transport": "cudaIpc", "shm_dir": str(tmp_path)}


def make_store(layout: KVLayout, *, filled: bool) -> DeviceKVStore:
    store = DeviceKVStore(layout, NUM_BLOCKS, torch.bfloat16, torch.device("cuda", 0), shared=True)
    assert not store.cache.any()
    if filled:
        store.cache.normal_()
        torch.cuda.synchronize()
    return store


def share(source: DeviceKVStore, target: DeviceKVStore) -> tuple[OpenCache, PeerCache]:
    ours = target.open_cache()
    return ours, source.map_cache(ours.descriptors(), ours.details)


@pytest.mark.parametrize("layout", [HEADS, LATENTS])
def test_pages_and_checksums(layout: KVLayout) -> None:
    source, target = make_store(layout, filled=True), make_store(layout, filled=True)
    ours, theirs = share(source, target)
    gate = ours.open_gate()
    for count, layers in ((1, range(5)), (7, range(2, 3)), (30, range(1, 5))):
        blocks = torch.randperm(NUM_BLOCKS)[:count].tolist()
        places = torch.randperm(NUM_BLOCKS)[:count].tolist()
        expected = target.cache.clone()
        some = slice(layers.start, layers.stop)
        expected[some, :, places] = source.cache[some, :, blocks]
        torch.cuda.synchronize()
        sent = theirs.push(blocks, places, layers, gate, 99)
        packed = bytes(source.export_blocks(blocks, layers))
        words = [int.from_bytes(packed[at : at + 8], "little") for at in range(0, len(packed), 8)]
        assert sent == checksum(words, 99) == ours.check(places, layers, 99)
        assert torch.equal(target.cache, expected)
        assert theirs.push(blocks, places, layers, gate, None) == 0
    data = os.urandom(layout.layer_bytes)
    sent = theirs.put(data, gate, 5)
    assert ours.read_scratch(len(data), 5) == (data, sent)
    assert ours.num_inside(gate) == 0
    theirs.close()
    ours.close()


def test_a_writer_that_comes_late_writes_nothing() -> None:
    source, target = make_store(HEADS, filled=True), make_store(HEADS, filled=False)
    ours, theirs = share(source, target)
    gate = ours.open_gate()
    ours.shut(gate)
    with pytest.raises(GateShutError):
        theirs.push([3], [4], range(5), gate, 1)
    with pytest.raises(GateShutError):
        theirs.put(b"x" * 64, gate, 1)
    assert ours.num_inside(gate) == 0
    torch.cuda.synchronize()
    assert not target.cache.any()
    ours.give_back(gate)
    theirs.close()
    ours.close()


def wait_for_someone(ours: OpenCache, gate: Gate) -> None:
    end = time.monotonic() + patience(60)
    while not ours.num_inside(gate):
        assert time.monotonic() < end


def num_missing(cache: torch.Tensor, source: DeviceKVStore) -> int:
    """The pages of the copied blocks that are not the source's."""
    same = cache[:, :, SLOW_BLOCKS] == source.cache[:, :, SLOW_BLOCKS]
    return int((~same.flatten(3).all(-1)).sum())


def test_a_gate_that_is_shut_in_a_long_copy_still_counts_the_writer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target = make_store(LARGE, filled=True), make_store(LARGE, filled=False)
    ours, theirs = share(source, target)
    gate = ours.open_gate()
    unused = ours.open_gate()
    ours.shut(unused)  # compiles the kernel, which takes longer than the copy
    monkeypatch.setattr(kernel, "_PROGRAMS", 1)
    copy = threading.Thread(target=theirs.push, args=(SLOW_BLOCKS, SLOW_BLOCKS, range(32), gate, 1))
    copy.start()
    wait_for_someone(ours, gate)
    ours.shut(gate)
    num_seen = 0
    while ours.num_inside(gate):
        num_seen += 1
    copied = target.cache.clone()
    torch.cuda.synchronize()
    copy.join()
    assert num_seen, "it was inside when the gate was shut"
    assert num_missing(copied, source) == num_missing(target.cache, source) == 0
    assert torch.equal(target.cache, copied)
    theirs.close()
    ours.close()


def copy_for_ever(pipe: "Connection[Any, Any]", gate: Gate, details: dict[str, Any]) -> None:
    """The peer's process: one copy after the other, each of them long."""
    kernel._PROGRAMS = 1
    source = make_store(LARGE, filled=True)
    theirs = source.map_cache([recv_handle(pipe), recv_handle(pipe)], details)
    pipe.send("ready")
    while True:
        theirs.push(SLOW_BLOCKS, SLOW_BLOCKS, range(32), gate, None)


def test_nothing_lands_after_a_writers_process_has_ended() -> None:
    """It is killed in a copy, and its gate goes on counting it."""
    target = make_store(LARGE, filled=False)
    ours = target.open_cache()
    gate = ours.open_gate()
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(
        target=copy_for_ever, args=(theirs, gate, dict(ours.details)), daemon=True
    )
    child.start()
    assert child.pid is not None
    for descriptor in ours.descriptors():
        send_handle(pipe, descriptor, child.pid)
    assert pipe.recv() == "ready"
    wait_for_someone(ours, gate)
    child.kill()
    child.join()
    target.cache.fill_(7)
    torch.cuda.synchronize()
    ours.shut(gate)
    for _ in range(300):
        assert bool((target.cache == 7).all())
    ours.close()
