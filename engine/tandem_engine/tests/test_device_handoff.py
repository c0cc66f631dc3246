"""The hand-off's own tests with two caches in a GPU's memory. Runs with `-m gpu`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tandem_engine.handoff.tests import scripted
from tandem_engine.handoff.tests.conftest import stack_fixture
from tandem_engine.handoff.tests.scripted import BytesStore
from tandem_engine.handoff.tests.test_handoff import test_pages_arrive
from tandem_engine.handoff.tests.test_probe import test_probe_touches_no_block
from tandem_engine.handoff.tests.test_staged_faults import (
    test_a_cancelled_request_waits_for_the_copy_that_is_under_way,
    test_a_full_ring_holds_the_sender_back,
    test_a_peer_that_wakes_after_it_was_cut_off_writes_to_the_ring_alone,
    test_staging_is_not_the_cache,
    test_what_comes_for_a_fenced_epoch_is_dropped_and_its_slot_freed,
)
from tandem_engine.memory import MemoryRegion, OpenCache, OwnStaging, PeerCache, Staging
from tandem_engine.runner.device_kv import DeviceKVStore
from tandem_wire.handoff import KVLayout

pytestmark = pytest.mark.gpu

__all__ = [
    "stack_fixture",
    "test_a_cancelled_request_waits_for_the_copy_that_is_under_way",
    "test_a_full_ring_holds_the_sender_back",
    "test_a_peer_that_wakes_after_it_was_cut_off_writes_to_the_ring_alone",
    "test_pages_arrive",
    "test_probe_touches_no_block",
    "test_staging_is_not_the_cache",
    "test_what_comes_for_a_fenced_epoch_is_dropped_and_its_slot_freed",
]


class DeviceBytes(BytesStore):
    """What a test compares, of a cache on the last GPU for P's, on the first for D's."""

    num_made = 0

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        device = torch.device("cuda", DeviceBytes.num_made % torch.cuda.device_count())
        DeviceBytes.num_made += 1
        self.store = DeviceKVStore(layout, num_blocks, torch.uint8, device, shared=True)

    @property
    def data(self) -> npt.NDArray[np.uint8]:  # type: ignore[override]
        shape = (self.layout.num_layers, self.layout.num_planes, -1, self.layout.page_bytes)
        found: npt.NDArray[np.uint8] = self.store.cache.cpu().numpy().reshape(shape)
        return found

    def fill(self, values: npt.NDArray[np.uint8]) -> None:
        self.store.cache.copy_(torch.from_numpy(values).view(self.store.cache.shape))
        torch.cuda.synchronize(self.store.cache.device)

    def export_blocks(self, blocks: Sequence[int], layers: range) -> memoryview:
        return self.store.export_blocks(blocks, layers)

    def import_blocks(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        self.store.import_blocks(blocks, layers, data)

    def regions(self) -> tuple[MemoryRegion, ...]:
        return self.store.regions()

    def make_staging(self, num_bytes: int) -> Staging:
        return self.store.make_staging(num_bytes)

    def make_own_staging(self, num_bytes: int) -> OwnStaging:
        return self.store.make_own_staging(num_bytes)

    def map_staging(self, descriptor: int, num_bytes: int) -> Staging:
        return self.store.map_staging(descriptor, num_bytes)

    def open_cache(self) -> OpenCache:
        return self.store.open_cache()

    def map_cache(self, descriptors: Sequence[int], details: Mapping[str, str | int]) -> PeerCache:
        return self.store.map_cache(descriptors, details)


@pytest.fixture(autouse=True)
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted, "SharingStore", DeviceBytes)
    monkeypatch.setattr(scripted, "BytesStore", DeviceBytes)


@pytest.fixture(name="options", params=["cudaIpcRing", "nixl"])
def options_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {"transport": request.param, "shm_dir": str(tmp_path)}
