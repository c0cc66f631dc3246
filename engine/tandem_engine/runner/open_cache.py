"""A GPU's KV cache that other processes write to themselves, and another process's, mapped here."""

import queue
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from cuda.bindings import driver

from tandem_engine.errors import GateShutError, StagingUnavailableError
from tandem_engine.memory import Gate, OpenCache, PeerCache
from tandem_engine.runner.shared_memory import SharedMemory, done
from tandem_kernels.checksum.reference import signed
from tandem_kernels.page_push import (
    GENERATION,
    WORD_BYTES,
    PageTarget,
    push_pages,
    shut_gate,
    sum_pages,
)

_NUM_GATES: Final = 8192
_GATES_BYTES: Final = _NUM_GATES * WORD_BYTES
_SCRATCH_BYTES: Final = 64 << 20
_PAGE_UNIT: Final = 16
"""A kernel writes whole pieces of so many bytes."""
_DESKS: Final = 2
_OVER_A_LINK: Final = 256 << 20
"""Bytes of a write to another GPU, which checks one while the next is on its way. Processes that
share a GPU take turns there, so one launch for all is best."""
_MASK: Final = (1 << 64) - 1


class Desk:
    """A stream, and room for what one launch needs: its job and block numbers.

    Numbers go to the GPU and results come back in one copy each, through locked memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device, priority=-1)
        self._device = device
        self._results = torch.empty(2, dtype=torch.int64, pin_memory=True)
        self._make_room(1024)

    def _make_room(self, num_words: int) -> None:
        self._host = torch.zeros(num_words, dtype=torch.int64, pin_memory=True)
        self._values = self._host.numpy()
        self._there = torch.zeros(num_words, dtype=torch.int64, device=self._device)

    def lay_out(self, seed: int | None, *lists: Sequence[int]) -> list[torch.Tensor]:
        """The job [3] of `tandem_kernels.page_push`, then every list, on the GPU."""
        ends = [3]
        for numbers in lists:
            ends.append(ends[-1] + len(numbers))
        if ends[-1] > len(self._host):
            self._make_room(2 * ends[-1])
        for start, end, numbers in zip(ends, ends[1:], lists, strict=False):
            self._values[start:end] = numbers
        self._values[2] = signed(seed or 0)
        self._there[: ends[-1]].copy_(self._host[: ends[-1]], non_blocking=True)
        starts = [0, *ends]
        return [self._there[start:end] for start, end in zip(starts, ends, strict=False)]

    def take_results(self) -> list[int]:
        """Wait for the launch; its results."""
        self._results.copy_(self._there[:2], non_blocking=True)
        self.stream.synchronize()
        found: list[int] = self._results.tolist()
        return found


class _Desks:
    """A few desks for many threads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: queue.SimpleQueue[Desk] = queue.SimpleQueue()
        with torch.cuda.device(device):
            for _ in range(_DESKS):
                self._free.put(Desk(device))

    @contextmanager
    def one(self) -> Iterator[Desk]:
        """A desk whose stream is the current one; nothing is under way there afterwards."""
        desk = self._free.get()
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(desk.stream):
                yield desk
        finally:
            desk.stream.synchronize()
            self._free.put(desk)


class DeviceOpenCache(OpenCache):
    """Our own cache, with gates and scratch room beside it in the memory of the same GPU."""

    def __init__(self, cache: torch.Tensor, memory: SharedMemory) -> None:
        """Of a cache [L, planes, N, K, P, D] in `memory`. Raises StagingUnavailableError."""
        page_bytes = cache.stride(2) * cache.element_size()
        if page_bytes % _PAGE_UNIT:
            raise StagingUnavailableError(
                f"a page of this worker's KV cache has {page_bytes} bytes, no multiple of "
                f"{_PAGE_UNIT}, so no kernel writes it into another cache"
            )
        self.scratch_bytes = _SCRATCH_BYTES
        self.details = {
            "num_blocks": cache.shape[2],
            "cache_bytes": memory.size,
            "gpu": str(torch.cuda.get_device_properties(cache.device).uuid),
        }
        self._cache = cache
        self._memory = memory
        self._beside = SharedMemory.make(cache.device, _GATES_BYTES + _SCRATCH_BYTES)
        room = self._beside.view()
        self._gates = room[:_GATES_BYTES].view(torch.int64).zero_()
        self._scratch = room[_GATES_BYTES : _GATES_BYTES + _SCRATCH_BYTES]
        self.free_gates = deque(range(_NUM_GATES))
        self._generations = [0] * _NUM_GATES
        self._desks = _Desks(cache.device)
        torch.cuda.synchronize(cache.device)
        self._compile()

    def _compile(self) -> None:
        """Now, or the first request that moves would wait for it: block 0 onto itself."""
        layers, place = (
            range(1),
            PageTarget(self._cache.data_ptr(), self._cache.shape[2], self._gates.data_ptr(), 0),
        )
        for seed in (None, _MASK >> 1):
            with self._desks.one() as desk:
                job, numbers = desk.lay_out(seed, [0])
                check = seed is not None
                push_pages(self._cache, numbers, place, numbers, layers, job, check=check)
        self.check([0], layers, _MASK >> 1)

    def descriptors(self) -> tuple[int, ...]:
        return self._memory.descriptor, self._beside.descriptor

    def open_gate(self) -> Gate:
        if not self.free_gates:
            raise StagingUnavailableError(
                f"all {_NUM_GATES} gates of this worker's cache are in use or have a writer that "
                "never left; restart it"
            )
        number = self.free_gates.popleft()
        return Gate(number, self._generations[number])

    @torch.inference_mode()
    def shut(self, gate: Gate) -> None:
        assert self._generations[gate.number] == gate.generation, "it is shut already"
        with self._desks.one():
            shut_gate(self._gates.data_ptr() + gate.number * WORD_BYTES)
        self._generations[gate.number] += 1

    @torch.inference_mode()
    def num_inside(self, gate: Gate) -> int:
        with self._desks.one():
            return int(self._gates[gate.number]) % GENERATION

    def give_back(self, gate: Gate) -> None:
        self.free_gates.append(gate.number)

    @torch.inference_mode()
    def check(self, blocks: Sequence[int], layers: range, seed: int) -> int:
        with self._desks.one() as desk:
            job, numbers = desk.lay_out(seed, blocks)
            sum_pages(self._cache, numbers, layers, job)
            return desk.take_results()[0] & _MASK

    @torch.inference_mode()
    def read_scratch(self, num_bytes: int, seed: int | None) -> tuple[bytes, int]:
        page = self._scratch[:num_bytes]
        with self._desks.one() as desk:
            job, numbers = desk.lay_out(seed, [0])
            if seed is not None:
                sum_pages(page.view(1, 1, 1, 1, 1, -1), numbers, range(1), job)
            checksum = desk.take_results()[0] & _MASK
            return page.cpu().numpy().tobytes(), checksum

    def close(self) -> None:
        self._beside.close()


class DevicePeerCache(PeerCache):
    """A cache of another process, on our GPU or on one that ours reaches."""

    num_lanes = _DESKS
    write_bytes = 1 << 30

    def __init__(
        self, cache: torch.Tensor, descriptors: Sequence[int], details: Mapping[str, str | int]
    ) -> None:
        """For pages of our own `cache`. Raises StagingUnavailableError."""
        device = cache.device
        cache_bytes, self._num_blocks = details.get("cache_bytes"), details.get("num_blocks")
        if not isinstance(cache_bytes, int) or len(descriptors) != 2:
            raise StagingUnavailableError("the peer does not say how large its cache is")
        if not _is_on(device, str(details.get("gpu"))):
            self.write_bytes = _OVER_A_LINK
        self._ours = cache
        self._cache = SharedMemory.open(device, cache_bytes, descriptors[0])
        try:
            room = _GATES_BYTES + _SCRATCH_BYTES
            self._beside = SharedMemory.open(device, room, descriptors[1])
        except StagingUnavailableError:
            self._cache.close()
            raise
        self._desks = _Desks(device)

    def _target(self, address: int, num_blocks: int, gate: Gate) -> PageTarget:
        door = self._beside.pointer + gate.number * WORD_BYTES
        return PageTarget(address, num_blocks, door, gate.generation)

    @torch.inference_mode()
    def push(
        self,
        source: Sequence[int],
        target: Sequence[int],
        layers: range,
        gate: Gate,
        seed: int | None,
    ) -> int:
        assert isinstance(self._num_blocks, int)
        place = self._target(self._cache.pointer, self._num_blocks, gate)
        with self._desks.one() as desk:
            job, ours, theirs = desk.lay_out(seed, source, target)
            check = seed is not None
            launched = push_pages(self._ours, ours, place, theirs, layers, job, check=check)
            return _admitted(desk, launched)

    @torch.inference_mode()
    def put(self, data: bytes, gate: Gate, seed: int | None) -> int:
        place = self._target(self._beside.pointer + _GATES_BYTES, 1, gate)
        with self._desks.one() as desk:
            host = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            page = host.to(self._ours.device).view(1, 1, 1, 1, 1, -1)
            job, numbers = desk.lay_out(seed, [0])
            check = seed is not None
            launched = push_pages(page, numbers, place, numbers, range(1), job, check=check)
            return _admitted(desk, launched)

    def close(self) -> None:
        self._cache.close()
        self._beside.close()


def _admitted(desk: Desk, launched: int) -> int:
    """The checksum that a push has found. Raises GateShutError."""
    checksum, admitted = desk.take_results()
    if admitted != launched:
        raise GateShutError("the peer has shut the gate to its cache: it has given this session up")
    return checksum & _MASK


def _is_on(device: torch.device, gpu: str) -> bool:
    """Whether the other GPU is ours.

    Raises StagingUnavailableError unless ours can count in the other's memory.
    """
    found = {
        str(torch.cuda.get_device_properties(number).uuid): number
        for number in range(torch.cuda.device_count())
    }
    ours = torch.cuda.current_device() if device.index is None else device.index
    theirs = found.get(gpu)
    if theirs is None:
        raise StagingUnavailableError(
            "the peer's GPU is hidden from this worker, so it can't be seen whether a gate works "
            "between the two; let both see both GPUs (CUDA_VISIBLE_DEVICES)"
        )
    if theirs == ours:
        return True
    wanted = driver.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    supported = done(
        driver.cuDeviceGetP2PAttribute(wanted, ours, theirs), "cuDeviceGetP2PAttribute"
    )
    if not supported:
        raise StagingUnavailableError(
            "the link between the two GPUs has no atomic operations, which a gate needs"
        )
    return False
