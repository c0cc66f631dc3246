"""Pages of a GPU's cache on their way through host memory. Runs with `-m gpu`."""

import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tandem_engine.runner.device_kv import DeviceKVStore
from tandem_wire.handoff import KVLayout

pytestmark = pytest.mark.gpu

HEADS = KVLayout(
    num_layers=5, num_kv_heads=3, head_dim=32, page_size=16, dtype="bfloat16", itemsize=2
)
LATENTS = KVLayout(
    num_layers=5, num_kv_heads=1, head_dim=40, page_size=16, dtype="bfloat16", itemsize=2,
    num_planes=1,
)  # fmt: skip
NUM_BLOCKS = 40


def make_store(layout: KVLayout, *, filled: bool) -> DeviceKVStore:
    store = DeviceKVStore(layout, NUM_BLOCKS, torch.bfloat16, torch.device("cuda", 0))
    assert not store.cache.any()
    if filled:
        store.cache.normal_()
        torch.cuda.synchronize()
    return store


@pytest.mark.parametrize("layout", [HEADS, LATENTS])
@pytest.mark.parametrize("pinned", [False, True])
def test_pages_arrive_through_memory_that_is_locked_or_not(layout: KVLayout, pinned: bool) -> None:
    source, target = make_store(layout, filled=True), make_store(layout, filled=False)
    room = mmap.mmap(-1, 7 * layout.block_bytes)
    with memoryview(room) as view:
        unpin = source.pin(view) if pinned else lambda: None
        for count, layers in ((1, range(5)), (7, range(2, 3)), (5, range(1, 5))):
            blocks = torch.randperm(NUM_BLOCKS)[:count].tolist()
            places = torch.randperm(NUM_BLOCKS)[:count].tolist()
            expected = target.cache.clone()
            some = slice(layers.start, layers.stop)
            expected[some, :, places] = source.cache[some, :, blocks]
            torch.cuda.synchronize()
            with view[: count * len(layers) * layout.layer_bytes] as part:
                source.export_into(blocks, layers, part)
                target.import_blocks(places, layers, part)
                assert bytes(part) == bytes(source.export_blocks(blocks, layers))
            assert torch.equal(target.cache, expected)
        unpin()
    room.close()


def test_threads_move_different_pages_at_once() -> None:
    source, target = make_store(HEADS, filled=True), make_store(HEADS, filled=False)

    def move(block: int) -> None:
        data = source.export_blocks([block], range(5))
        target.import_blocks([NUM_BLOCKS - 1 - block], range(5), memoryview(bytes(data)))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(move, range(NUM_BLOCKS)))
    assert torch.equal(target.cache, source.cache.flip(2))


def test_an_import_waits_for_the_steps_before_its_blocks_were_reserved() -> None:
    store, data = make_store(HEADS, filled=False), bytearray(2 * HEADS.block_bytes)
    before, after = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda._sleep(50_000_000)
    before.record()
    store.steps_until(before)
    store.reserve([3, 7])
    torch.cuda._sleep(2_000_000_000)
    after.record()
    store.steps_until(after)
    store.import_blocks([3, 7], range(5), memoryview(data))
    assert before.query()
    assert not after.query(), "the import waited for a step launched after its blocks were reserved"
    store.import_blocks([3, 8], range(5), memoryview(data))
    assert after.query(), "the import did not wait for a step that may write to its block"
    later = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    later.record()
    store.steps_until(later)
    store.settle([8])
    store.import_blocks([3, 8], range(5), memoryview(data))
    assert not later.query()


def test_bytes_of_another_length_are_refused() -> None:
    store = make_store(HEADS, filled=False)
    with pytest.raises(ValueError, match="bytes for pages"):
        store.import_blocks([1, 2], range(5), memoryview(bytearray(HEADS.block_bytes)))
    with pytest.raises(ValueError, match="bytes for pages"):
        store.export_into([1], range(4), memoryview(bytearray(HEADS.block_bytes)))
