"""Pages of a cache in host memory, as the hand-off sees them."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem_engine.errors import ConfigError
from tandem_engine.runner.host_kv import HostKVStore
from tandem_wire.handoff import KVLayout

LAYOUT = KVLayout(
    num_layers=3, num_kv_heads=2, head_dim=4, page_size=8, dtype="float32", itemsize=4
)
LATENTS = KVLayout(
    num_layers=3, num_kv_heads=1, head_dim=12, page_size=8, dtype="float32", itemsize=4,
    num_planes=1,
)  # fmt: skip
NUM_BLOCKS = 6


def make_store(shared_dir: str = "", layout: KVLayout = LAYOUT) -> HostKVStore:
    store = HostKVStore(layout, NUM_BLOCKS, torch.float32, shared_dir)
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
    source, target = make_store("", layout), HostKVStore(layout, NUM_BLOCKS, torch.float32)
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


def test_a_shared_file_holds_the_cache_for_other_processes(tmp_path: Path) -> None:
    store = make_store(str(tmp_path))
    path, size = store.shared_file() or ("", 0)
    assert size == NUM_BLOCKS * LAYOUT.block_bytes
    mapped = np.memmap(path, np.float32, "r+").reshape(store.cache.shape)
    assert np.array_equal(mapped, store.cache.numpy())
    mapped[2, 1, 3] = -1.0
    assert (store.cache[2, 1, 3] == -1.0).all()
    store.close()
    assert not Path(path).exists()
    assert store.shared_file() is None


def _die_with_a_file(directory: str) -> None:
    make_store(directory)


def test_files_of_dead_processes_are_removed_and_others_kept(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("spawn").Process(
        target=_die_with_a_file, args=(str(tmp_path),)
    )
    worker.start()
    worker.join(120)
    assert worker.exitcode == 0
    assert len(list(tmp_path.glob("tandem-kv-*"))) == 1
    first = make_store(str(tmp_path))
    second = make_store(str(tmp_path))
    kept = [(str(path), path.stat().st_size) for path in tmp_path.glob("tandem-kv-*")]
    assert sorted(kept) == sorted(filter(None, (first.shared_file(), second.shared_file())))
    first.close()
    second.close()


def test_a_shared_directory_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs \d+ bytes, but .* free; lower --kv-memory"):
        HostKVStore(LAYOUT, 1 << 40, torch.float32, str(tmp_path))


def test_latents_have_one_plane() -> None:
    store = make_store("", LATENTS)
    assert store.cache.shape == (3, 1, NUM_BLOCKS, 1, 8, 12)
    packed = store.export_blocks([4, 1], range(1, 3))
    found = np.frombuffer(packed, np.float32).reshape(2, 1, 2, 1, 8, 12)
    assert torch.equal(torch.from_numpy(found.copy()), store.cache[1:3][:, :, [4, 1]])
    assert len(packed) == 2 * 2 * LATENTS.page_bytes == 2 * 2 * LATENTS.layer_bytes
