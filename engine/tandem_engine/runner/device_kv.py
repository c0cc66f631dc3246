"""The KV cache of one worker in device memory."""

import threading
from collections.abc import Sequence

import numpy as np
import torch

from tandem_engine.runner.base import KVStore
from tandem_kernels.transfer import pack, unpack
from tandem_wire.handoff import KVLayout


class DeviceKVStore(KVStore):
    """KV as [layer, K/V, block, head, token, dim] on a CUDA device, zero at first.

    Pages leave and arrive through pinned host memory, on streams of their own. The runner tells by
    `steps_until` up to where the steps have been launched: a page that is imported may have
    belonged to a sequence that a step in flight still writes for.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout = layout
        self.cache = torch.zeros(
            (layout.num_layers, layout.num_planes, num_blocks, layout.num_kv_heads,
             layout.page_size, layout.head_dim),
            dtype=dtype,
            device=device,
        )  # fmt: skip
        self._device = device
        self._exporting, self._importing = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._export_lock, self._import_lock = threading.Lock(), threading.Lock()
        self._steps = torch.cuda.Event()

    def steps_until(self, event: torch.cuda.Event) -> None:
        """The event after the last step that was launched."""
        self._steps = event

    @torch.inference_mode()
    def export_blocks(self, blocks: Sequence[int], layers: range) -> memoryview:
        host = self._pinned(blocks, layers)
        with self._export_lock, torch.cuda.stream(self._exporting):
            host.copy_(pack(self.cache, self._numbers(blocks), layers), non_blocking=True)
            self._exporting.synchronize()
        return host.view(torch.uint8).numpy().data.cast("B")

    @torch.inference_mode()
    def import_blocks(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        host = self._pinned(blocks, layers)
        expected = host.nbytes
        if data.nbytes != expected:
            raise ValueError(f"{data.nbytes} bytes for pages of {expected} bytes")
        host.view(torch.uint8).numpy().reshape(-1)[:] = np.frombuffer(data, np.uint8)
        with self._import_lock, torch.cuda.stream(self._importing):
            packed = host.to(self._device, non_blocking=True)
            numbers = self._numbers(blocks)
            self._importing.wait_event(self._steps)
            unpack(packed, self.cache, numbers, layers)
            self._importing.synchronize()

    def _pinned(self, blocks: Sequence[int], layers: range) -> torch.Tensor:
        """Host memory for packed pages."""
        shape = (len(layers), self.layout.num_planes, len(blocks), *self.cache.shape[3:])
        # A thread's current device is the first one until it says otherwise.
        with torch.cuda.device(self._device):
            return torch.empty(shape, dtype=self.cache.dtype, pin_memory=True)

    def _numbers(self, blocks: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(blocks), dtype=torch.int64, device=self._device)

    def copy_block(self, source: int, destination: int) -> None:
        """Copy all layers of one block, on the current stream."""
        self.cache[:, :, destination] = self.cache[:, :, source]
