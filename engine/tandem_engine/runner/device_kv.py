"""The KV cache of one worker in device memory."""

import logging
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import numpy as np
import torch

from tandem_engine.device import upload
from tandem_engine.step import KVStore
from tandem_kernels.transfer import pack, unpack
from tandem_wire.handoff import KVLayout

_STREAMS: Final = 2
"""Exports at a time, and imports at a time."""
_PORTABLE: Final = 1
"""cudaHostRegisterPortable: the memory is locked for every device."""

log = logging.getLogger(__name__)


class DeviceKVStore(KVStore):
    """KV as [layer, K/V, block, head, token, dim] on a CUDA device, zero at first.

    Pages leave and arrive through memory of the host, on streams of their own: a few at a time, so
    that what they take of the device is bounded, and before whatever waits of the steps. The runner
    tells by `steps_until` up to where the steps are launched: a page that is imported may have
    belonged to a sequence that a step in flight still writes for. Imports wait for the steps that
    were launched before `reserve` and no others: decodes go on all the time, and every piece would
    wait for one.
    """

    write_bytes = 8 << 20  # so large that a copy to the host takes longer than its launch

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
        self._exporting: queue.SimpleQueue[torch.cuda.Stream] = queue.SimpleQueue()
        self._importing: queue.SimpleQueue[torch.cuda.Stream] = queue.SimpleQueue()
        for streams in (self._exporting, self._importing):
            for _ in range(_STREAMS):
                streams.put(torch.cuda.Stream(device, priority=-1))
        self._steps = torch.cuda.Event()
        self._last_use: dict[int, torch.cuda.Event] = {}
        # Compiled now, or the first request that moves would wait for it. Other streams must not
        # see the cache before it is zero.
        torch.cuda.synchronize(device)
        self.import_blocks([0], range(1), self.export_blocks([0], range(1)))

    def steps_until(self, event: torch.cuda.Event) -> None:
        """Learn of the event after the last step that was launched."""
        self._steps = event

    def reserve(self, blocks: Sequence[int]) -> None:
        self._last_use.update(dict.fromkeys(blocks, self._steps))

    def settle(self, blocks: Sequence[int]) -> None:
        # Waiting for an event that was never recorded returns at once.
        self._last_use.update(dict.fromkeys(blocks, torch.cuda.Event()))

    def export_blocks(self, blocks: Sequence[int], layers: range) -> memoryview:
        with torch.cuda.device(self._device):
            host = torch.empty(self._num_bytes(blocks, layers), dtype=torch.uint8, pin_memory=True)
        self._export(blocks, layers, host)
        return host.numpy().data

    def export_into(self, blocks: Sequence[int], layers: range, out: memoryview) -> None:
        self._check_size(blocks, layers, out)
        self._export(blocks, layers, torch.frombuffer(out, dtype=torch.uint8))

    @torch.inference_mode()
    def _export(self, blocks: Sequence[int], layers: range, host: torch.Tensor) -> None:
        with self._stream(self._exporting) as stream:
            packed = pack(self.cache, self._numbers(blocks), layers)
            host.copy_(packed.view(-1).view(torch.uint8), non_blocking=True)
            stream.synchronize()

    @torch.inference_mode()
    def import_blocks(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        self._check_size(blocks, layers, data)
        host = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)
        shape = (len(layers), self.layout.num_planes, len(blocks), *self.cache.shape[3:])
        with self._stream(self._importing) as stream:
            packed = host.to(self._device, non_blocking=True).view(self.cache.dtype).view(shape)
            numbers = self._numbers(blocks)
            uses = [self._last_use.get(block, self._steps) for block in blocks]
            for event in {id(use): use for use in uses}.values():
                stream.wait_event(event)
            unpack(packed, self.cache, numbers, layers)
            stream.synchronize()

    def pin(self, buffer: memoryview) -> Callable[[], None]:
        """Lock memory, so that the device reads and writes it without a copy in between.

        Where the system doesn't let a process lock that much, transfers are slower but correct.
        """
        runtime, address = torch.cuda.cudart(), np.frombuffer(buffer, np.uint8).ctypes.data
        with torch.cuda.device(self._device):
            result = runtime.cudaHostRegister(address, buffer.nbytes, _PORTABLE)
        if int(result):
            log.warning(
                "can't lock %d bytes of shared memory (%s), so KV transfers are slower; "
                "raise the limit of locked memory (ulimit -l)",
                buffer.nbytes,
                result,
            )
            with suppress(RuntimeError):
                torch.zeros(
                    1, device=self._device
                )  # clears the error, or a later call would raise it
            return super().pin(buffer)

        def unpin() -> None:
            runtime.cudaHostUnregister(address)

        return unpin

    @contextmanager
    def _stream(
        self, streams: "queue.SimpleQueue[torch.cuda.Stream]"
    ) -> Iterator[torch.cuda.Stream]:
        """One of `streams` as the current stream; waits until one is free."""
        stream = streams.get()
        try:
            # A thread's current device is the first one unless it is set.
            with torch.cuda.device(self._device), torch.cuda.stream(stream):
                yield stream
        finally:
            streams.put(stream)

    def _num_bytes(self, blocks: Sequence[int], layers: range) -> int:
        return len(layers) * len(blocks) * self.layout.layer_bytes

    def _check_size(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        expected = self._num_bytes(blocks, layers)
        if data.nbytes != expected:
            raise ValueError(f"got {data.nbytes} bytes for pages of {expected} bytes")

    def _numbers(self, blocks: Sequence[int]) -> torch.Tensor:
        return upload(blocks, torch.int64, self._device)

    def copy_block(self, source: int, destination: int) -> None:
        """Copy all layers of one block, on the current stream."""
        self.cache[:, :, destination] = self.cache[:, :, source]
