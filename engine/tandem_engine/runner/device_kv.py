"""The KV cache of one worker in device memory."""

import logging
import queue
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from tandem_engine.device import download, upload
from tandem_engine.errors import StagingUnavailableError
from tandem_engine.memory import MemoryRegion, OpenCache, OwnStaging, PeerCache, Staging
from tandem_engine.step import KVStore
from tandem_kernels.checksum import checksum_parts
from tandem_kernels.transfer import pack, unpack
from tandem_wire.handoff import KVLayout

_STREAMS: Final = 2
"""Exports at a time, and imports at a time."""
_PORTABLE: Final = 1
"""cudaHostRegisterPortable: the memory is locked for every device."""

_MASK: Final = (1 << 64) - 1
_WORD_BYTES: Final = 8

if TYPE_CHECKING:
    from tandem_engine.runner.shared_memory import SharedMemory
    from tandem_kernels.checked_transfer.kernel import CheckedMover

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
        self,
        layout: KVLayout,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        shared: bool = False,
    ) -> None:
        """With `shared`, other processes can map the cache, if the machine has what that takes."""
        self.layout = layout
        shape = (layout.num_layers, layout.num_planes, num_blocks, layout.num_kv_heads,
                 layout.page_size, layout.head_dim)  # fmt: skip
        self._memory: SharedMemory | None = None
        self._why_not = "its cache was made for other transports (see --transfer)"
        if shared:
            self._share(prod(shape) * dtype.itemsize, device)
        self.cache = (
            torch.zeros(shape, dtype=dtype, device=device)
            if self._memory is None
            else self._memory.view(gives_up=True)[: prod(shape) * dtype.itemsize]
            .zero_()
            .view(dtype)
            .view(shape)
        )
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

    def _share(self, num_bytes: int, device: torch.device) -> None:
        """Make the memory of a cache that other processes can map, or note why there is none."""
        try:
            self._memory = _shared_memory().make(device, num_bytes)
        except StagingUnavailableError as error:
            self._why_not = str(error)
            log.warning("this worker's KV cache can't be shared with other processes: %s", error)

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
        with self._stream(self._importing) as stream:
            self.unpack(host.to(self._device, non_blocking=True), blocks, layers, stream)
            stream.synchronize()

    def unpack(
        self, packed: torch.Tensor, blocks: Sequence[int], layers: range, stream: torch.cuda.Stream
    ) -> None:
        """Put packed bytes into `blocks`, after the steps that may still write to them."""
        numbers = self._numbers(blocks)
        self.await_steps(blocks, stream)
        pages = packed.view(self.cache.dtype).view(self._packed_shape(blocks, layers))
        unpack(pages, self.cache, numbers, layers)

    def await_steps(self, blocks: Sequence[int], stream: torch.cuda.Stream) -> None:
        """Have `stream` wait for the steps that may still write to `blocks`."""
        uses = [self._last_use.get(block, self._steps) for block in blocks]
        for event in {id(use): use for use in uses}.values():
            stream.wait_event(event)

    def _packed_shape(self, blocks: Sequence[int], layers: range) -> tuple[int, ...]:
        return (len(layers), self.layout.num_planes, len(blocks), *self.cache.shape[3:])

    def regions(self) -> tuple[MemoryRegion, ...]:
        num_bytes = self.cache.numel() * self.cache.element_size()
        device = self._device.index or 0
        return (MemoryRegion("cuda", self.cache.data_ptr(), num_bytes, device),)

    def make_staging(self, num_bytes: int) -> Staging:
        if self.layout.layer_bytes % _WORD_BYTES:
            raise StagingUnavailableError(
                f"a layer of a block has {self.layout.layer_bytes} bytes, no multiple of "
                f"{_WORD_BYTES}, so it has no checksum on a GPU; use Shm"
            )
        return DeviceStaging(self, _shared_memory().make(self._device, num_bytes))

    def map_staging(self, descriptor: int, num_bytes: int) -> Staging:
        return DeviceStaging(self, _shared_memory().open(self._device, num_bytes, descriptor))

    def open_cache(self) -> OpenCache:
        if self._memory is None:
            raise StagingUnavailableError(self._why_not)
        from tandem_engine.runner.open_cache import DeviceOpenCache

        return DeviceOpenCache(self.cache, self._memory)

    def map_cache(self, descriptors: Sequence[int], details: Mapping[str, str | int]) -> PeerCache:
        _shared_memory()
        from tandem_engine.runner.open_cache import DevicePeerCache

        return DevicePeerCache(self.cache, descriptors, details)

    def is_settled(self, blocks: Collection[int]) -> bool:
        uses = [self._last_use.get(block, self._steps) for block in blocks]
        return all(use.query() for use in {id(use): use for use in uses}.values())

    @cached_property
    def mover(self) -> "CheckedMover":
        """Packs and unpacks pages for staging of this process's own; first used before any step."""
        from tandem_kernels.checked_transfer.kernel import CheckedMover

        mover = CheckedMover(self.cache)
        with torch.cuda.device(self._device), torch.inference_mode():
            mover.prepare()  # else the first request that moves would wait for it
            torch.cuda.synchronize()
        return mover

    def make_own_staging(self, num_bytes: int) -> OwnStaging:
        if self.layout.page_bytes % _WORD_BYTES:
            raise StagingUnavailableError(
                f"a page has {self.layout.page_bytes} bytes, no multiple of {_WORD_BYTES}, "
                "so it has no checksum on a GPU"
            )
        try:
            from tandem_engine.runner.own_staging import DeviceOwnStaging
        except ImportError as error:
            raise _needs_bindings(error) from error
        return DeviceOwnStaging(self, self._device, num_bytes)

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

    @contextmanager
    def staging_stream(self, *, exporting: bool) -> Iterator[torch.cuda.Stream]:
        """A stream as the current one, which has ended its work when the context ends."""
        with self._stream(self._exporting if exporting else self._importing) as stream:
            try:
                yield stream
            finally:
                stream.synchronize()

    def copy_block(self, source: int, destination: int) -> None:
        """Copy all layers of one block, on the current stream."""
        self.cache[:, :, destination] = self.cache[:, :, source]


class DeviceStaging(Staging):
    """Staging in the memory of a GPU: the store's own, or that of another process's GPU.

    Pages are packed in our own memory first, and leave it by a copy engine. Checksums are computed
    where the bytes are: before they leave, and after they have arrived.
    """

    kind = "cuda"
    num_lanes = _STREAMS

    def __init__(self, store: DeviceKVStore, memory: "SharedMemory") -> None:
        """Take over `memory`."""
        self.num_bytes = memory.size
        self._store = store
        self._memory = memory
        self._bytes = memory.view() if memory.descriptor >= 0 else None

    def descriptor(self) -> int:
        return self._memory.descriptor

    @torch.inference_mode()
    def stage(self, blocks: Sequence[int], layers: range, at: int, seed: int | None) -> int:
        store = self._store
        with store.staging_stream(exporting=True) as stream:
            numbers = upload(blocks, torch.int64, store.cache.device)
            packed = pack(store.cache, numbers, layers).view(-1).view(torch.uint8)
            parts = _checksum(packed, seed)
            self._memory.write(at, packed, stream)
        return _total(parts)

    @torch.inference_mode()
    def unstage(self, blocks: Sequence[int], layers: range, at: int, seed: int | None) -> int:
        store = self._store
        num_bytes = len(layers) * len(blocks) * store.layout.layer_bytes
        with store.staging_stream(exporting=False) as stream:
            packed = self._view(at, num_bytes)
            parts = _checksum(packed, seed)
            store.unpack(packed, blocks, layers, stream)
        return _total(parts)

    @torch.inference_mode()
    def put(self, data: bytes, at: int, seed: int | None) -> int:
        store = self._store
        with store.staging_stream(exporting=True) as stream:
            host = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            packed = host.to(store.cache.device)
            parts = _checksum(packed, seed)
            self._memory.write(at, packed, stream)
        return _total(parts)

    @torch.inference_mode()
    def get(self, num_bytes: int, at: int, seed: int | None) -> tuple[bytes, int]:
        with self._store.staging_stream(exporting=False):
            packed = self._view(at, num_bytes)
            parts, host = _checksum(packed, seed), download(packed)
        return host.numpy().tobytes(), _total(parts)

    def _view(self, at: int, num_bytes: int) -> torch.Tensor:
        assert self._bytes is not None, "only the owner reads what was staged"
        return self._bytes[at : at + num_bytes]

    def close(self) -> None:
        self._bytes = None
        self._memory.close()


def _checksum(packed: torch.Tensor, seed: int | None) -> torch.Tensor | None:
    """Its parts in the host's memory, complete once the current stream has come this far."""
    if seed is None:
        return None
    return download(checksum_parts(packed.view(torch.int64), seed))


def _total(parts: torch.Tensor | None) -> int:
    return 0 if parts is None else int(parts.sum()) & _MASK


def _shared_memory() -> "type[SharedMemory]":
    """Needs a package that only a GPU's torch brings. Raises StagingUnavailableError."""
    try:
        from tandem_engine.runner.shared_memory import SharedMemory
    except ImportError as error:
        raise _needs_bindings(error) from error
    return SharedMemory


def _needs_bindings(error: ImportError) -> StagingUnavailableError:
    return StagingUnavailableError(
        f"{error}; pip install cuda-bindings, of the CUDA version that torch has"
    )
