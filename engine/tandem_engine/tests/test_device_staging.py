"""Pages staged in a GPU's memory and mapped by its descriptor. Runs with `-m gpu`."""

import os

import pytest
import torch

from tandem_engine.errors import StagingUnavailableError
from tandem_engine.runner.device_kv import DeviceKVStore
from tandem_engine.tests.test_device_kv import HEADS, LATENTS, NUM_BLOCKS, make_store
from tandem_kernels.checksum.reference import checksum
from tandem_wire.handoff import KVLayout

pytestmark = pytest.mark.gpu

ROOM = 1 << 20


def words(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]


@pytest.mark.parametrize("layout", [HEADS, LATENTS])
@pytest.mark.parametrize("checked", [False, True])
def test_pages_arrive_through_memory_that_two_map(layout: KVLayout, checked: bool) -> None:
    source, target = make_store(layout, filled=True), make_store(layout, filled=False)
    ours = target.make_staging(2 * ROOM)
    descriptor = os.dup(ours.descriptor())
    theirs = source.map_staging(descriptor, 2 * ROOM)
    os.close(descriptor)
    assert ours.num_bytes == theirs.num_bytes >= 2 * ROOM
    seed = 99 if checked else None
    for at, count, layers in ((0, 1, range(5)), (ROOM, 7, range(2, 3)), (4096, 5, range(1, 5))):
        ours.put(b"\xff" * ROOM, at, None)
        blocks = torch.randperm(NUM_BLOCKS)[:count].tolist()
        places = torch.randperm(NUM_BLOCKS)[:count].tolist()
        expected = target.cache.clone()
        some = slice(layers.start, layers.stop)
        expected[some, :, places] = source.cache[some, :, blocks]
        torch.cuda.synchronize()
        packed = bytes(source.export_blocks(blocks, layers))
        sent = theirs.stage(blocks, layers, at, seed)
        assert ours.get(len(packed), at, seed) == (packed, sent)
        assert ours.unstage(places, layers, at, seed) == sent
        assert sent == (checksum(words(packed), 99) if checked else 0)
        assert torch.equal(target.cache, expected)
    theirs.close()
    ours.close()
    ours.close()


def test_what_the_peer_writes_late_lands_in_the_ring_and_nowhere_else() -> None:
    source, target = make_store(HEADS, filled=True), make_store(HEADS, filled=False)
    ours = target.make_staging(ROOM)
    theirs = source.map_staging(ours.descriptor(), ROOM)
    ours.close()  # the memory lives on as long as the other one maps it
    theirs.stage([3], range(5), 0, 1)
    assert not target.cache.any()
    theirs.close()


def test_a_changed_byte_changes_the_checksum() -> None:
    store: DeviceKVStore = make_store(HEADS, filled=True)
    ours = store.make_staging(ROOM)
    sent = ours.stage([4], range(5), 0, 7)
    data, _ = ours.get(HEADS.block_bytes, 0, 7)
    ours.put(bytes([data[0] ^ 1]) + data[1:], 0, None)
    assert ours.unstage([5], range(5), 0, 7) != sent
    ours.close()


def test_what_can_not_be_mapped_is_said() -> None:
    store = make_store(HEADS, filled=False)
    file = os.memfd_create("no GPU's")
    with pytest.raises(StagingUnavailableError, match="cuMemImportFromShareableHandle"):
        store.map_staging(file, ROOM)
    os.close(file)
    with pytest.raises(StagingUnavailableError, match="cuMemCreate"):
        store.make_staging(1 << 50)
