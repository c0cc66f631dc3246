"""Pages of a cache in host memory, as the hand-off sees them."""

import numpy as np
import pytest
import torch

from tandem_engine.runner.host_kv import LEAST_VIEW_BYTES, HostKVStore
from tandem_wire.handoff import KVLayout

LAYOUT = KVLayout(
    num_layers=3, num_kv_heads=2, head_dim=4, page_size=8, dtype="float32", itemsize=4
)
LATENTS = KVLayout(
    num_layers=3, num_kv_heads=1, head_dim=12, page_size=8, dtype="float32", itemsize=4,
    num_planes=1,
)  # fmt: skip
NUM_BLOCKS = 6


def make_store(layout: KVLayout = LAYOUT) -> HostKVStore:
    store = HostKVStore(layout, NUM_BLOCKS, torch.float32)
    store.cache.copy_(torch.arange(store.cache.numel()).view(store.cache.shape))
    return store


def test_packed_order_is_layer_kv_page_head_token_dim() -> None:
    store = make_store()
    packed = store.export_blocks([4, 1], range(1, 3))
    found = np.frombuffer(packed, np.float32).reshape(2, 2, 2, 2, 8, 4)
    assert torch.equal(torch.from_numpy(found.copy()), store.cache[1:3][:, :, [4, 1]])
    assert len(packed) == 2 * 2 * 2 * LAYOUT.page_bytes


@pytest.mark.parametrize("layout", [LAYOUT, LATENTS])
def test_pages_come_back_as_they_left(layout: KVLayout) -> None:
    source, target = make_store(layout), HostKVStore(layout, NUM_BLOCKS, torch.float32)
    assert not target.cache.any()
    for layers in (range(0, 1), range(1, 3)):
        target.import_blocks([5, 0], layers, memoryview(source.export_blocks([2, 3], layers)))
    assert torch.equal(target.cache[:, :, [5, 0]], source.cache[:, :, [2, 3]])
    assert not target.cache[:, :, [1, 2, 3, 4]].any()
    source.copy_block(0, 5)
    assert torch.equal(source.cache[:, :, 5], source.cache[:, :, 0])


def test_bytes_of_another_length_are_refused() -> None:
    store = make_store()
    with pytest.raises(ValueError, match=r"bytes for pages of"):
        store.import_blocks([0], range(0, 3), memoryview(b"x" * (LAYOUT.block_bytes - 1)))


def test_pages_are_seen_where_they_lie_and_neighbours_as_one() -> None:
    layout = KVLayout(
        num_layers=2, num_kv_heads=4, head_dim=64, page_size=16, dtype="float32", itemsize=4
    )
    store = make_store(layout)
    assert layout.page_bytes == LEAST_VIEW_BYTES
    views = store.views([4, 1, 2], range(1, 2))
    assert views is not None
    assert [len(view) for view in views] == 2 * [layout.page_bytes, 2 * layout.page_bytes]
    assert b"".join(views) == bytes(store.export_blocks([4, 1, 2], range(1, 2)))
    views[0][:] = bytes(layout.page_bytes)
    assert not store.cache[1, 0, 4].any()
    assert store.cache[1, 0, 3].any()


def test_small_pages_are_packed_unless_they_are_neighbours() -> None:
    layout = KVLayout(
        num_layers=1, num_kv_heads=2, head_dim=64, page_size=16, dtype="float32", itemsize=4
    )
    store = make_store(layout)
    assert store.views([4, 1], range(1)) is None
    views = store.views([4, 5], range(1))
    assert views is not None
    assert len(views) == layout.num_planes


def test_an_exported_page_does_not_change_later() -> None:
    store = make_store()
    packed = bytes(store.export_blocks([1], range(3)))
    view = store.export_blocks([1], range(3))
    store.cache.zero_()
    assert bytes(view) == packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pages(dtype: torch.dtype) -> None:
    layout = KVLayout(
        num_layers=1, num_kv_heads=1, head_dim=4, page_size=2, dtype=str(dtype), itemsize=2
    )
    store = HostKVStore(layout, 2, dtype)
    store.cache[0, 0, 1] = 1.5
    store.import_blocks([0], range(1), memoryview(store.export_blocks([1], range(1))))
    assert torch.equal(store.cache[:, :, 0], store.cache[:, :, 1])


def test_latents_have_one_plane() -> None:
    store = make_store(LATENTS)
    assert store.cache.shape == (3, 1, NUM_BLOCKS, 1, 8, 12)
    packed = store.export_blocks([4, 1], range(1, 3))
    found = np.frombuffer(packed, np.float32).reshape(2, 1, 2, 1, 8, 12)
    assert torch.equal(torch.from_numpy(found.copy()), store.cache[1:3][:, :, [4, 1]])
    assert len(packed) == 2 * 2 * LATENTS.page_bytes == 2 * 2 * LATENTS.layer_bytes
