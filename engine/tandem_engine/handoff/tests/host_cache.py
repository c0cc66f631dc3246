"""What stands in for a GPU's open cache on a CPU: host memory, mapped by descriptors too.

A gate is a word of shared memory here as well; a lock of the file stands in for the GPU's atomic
operations, and `HostPeerCache.push` for the kernel that enters, writes and leaves.
"""

import fcntl
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
import xxhash

from tandem_engine.errors import GateShutError, StagingUnavailableError
from tandem_engine.memory import Gate, OpenCache, PeerCache
from tandem_engine.step import KVStore

_NUM_GATES: Final = 64
_GATES_BYTES: Final = _NUM_GATES * 8
_SCRATCH_BYTES: Final = 1 << 16
_GENERATION: Final = 1 << 32
_LOCK = threading.Lock()


class SharedFile:
    """Memory without a name, mapped here; another process maps it by its descriptor."""

    def __init__(self, name: str, num_bytes: int) -> None:
        self.descriptor = os.memfd_create(name)
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, num_bytes)
        self.map = mmap.mmap(self.descriptor, num_bytes)


class Gates:
    """The gates in a mapped file, changed one at a time."""

    def __init__(self, descriptor: int, room: mmap.mmap) -> None:
        self._descriptor = descriptor
        self._words = np.frombuffer(room, np.int64, _NUM_GATES)

    def add(self, number: int, change: int) -> int:
        """The word before the change."""
        with _LOCK:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
            try:
                before = int(self._words[number])
                self._words[number] += change
            finally:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
        return before


def checksum_of(data: bytes | memoryview, seed: int | None) -> int:
    return 0 if seed is None else xxhash.xxh3_64_intdigest(data, seed)


class HostOpenCache(OpenCache):
    """A cache in a shared file."""

    scratch_bytes = _SCRATCH_BYTES

    def __init__(self, kv: KVStore, file: SharedFile) -> None:
        self._kv = kv
        self._file = file
        self._beside = SharedFile("gates", _GATES_BYTES + _SCRATCH_BYTES)
        self.details = {"cache_bytes": len(file.map)}
        self.gates = Gates(self._beside.descriptor, self._beside.map)
        self.free_gates = deque(range(_NUM_GATES))

    def descriptors(self) -> tuple[int, ...]:
        return self._file.descriptor, self._beside.descriptor

    def open_gate(self) -> Gate:
        if not self.free_gates:
            raise StagingUnavailableError("all gates of this worker's cache are in use")
        number = self.free_gates.popleft()
        return Gate(number, self.gates.add(number, 0) // _GENERATION)

    def shut(self, gate: Gate) -> None:
        self.gates.add(gate.number, _GENERATION)

    def num_inside(self, gate: Gate) -> int:
        return self.gates.add(gate.number, 0) % _GENERATION

    def give_back(self, gate: Gate) -> None:
        self.free_gates.append(gate.number)

    def check(self, blocks: Sequence[int], layers: range, seed: int) -> int:
        return checksum_of(self._kv.export_blocks(blocks, layers), seed)

    def read_scratch(self, num_bytes: int, seed: int | None) -> tuple[bytes, int]:
        data = self._beside.map[_GATES_BYTES : _GATES_BYTES + num_bytes]
        return data, checksum_of(data, seed)

    def close(self) -> None:
        return None


class HostPeerCache(PeerCache):
    """Another worker's shared file, mapped here."""

    def __init__(
        self, kv: KVStore, descriptors: Sequence[int], details: Mapping[str, str | int]
    ) -> None:
        cache, beside = descriptors
        self._kv = kv
        self._map = mmap.mmap(cache, int(details["cache_bytes"]))
        self._beside = mmap.mmap(beside, _GATES_BYTES + _SCRATCH_BYTES)
        self._descriptor = os.dup(beside)
        weakref.finalize(self, os.close, self._descriptor)
        self._gates = Gates(self._descriptor, self._beside)
        layout = kv.layout
        shape = (layout.num_layers, layout.num_planes, -1, layout.page_bytes)
        self._pages = np.frombuffer(self._map, np.uint8).reshape(shape)

    @contextmanager
    def _inside(self, gate: Gate) -> Iterator[None]:
        try:
            if self._gates.add(gate.number, 1) // _GENERATION != gate.generation:
                raise GateShutError("the peer has shut the gate to its cache")
            yield
        finally:
            self._gates.add(gate.number, -1)

    def push(
        self,
        source: Sequence[int],
        target: Sequence[int],
        layers: range,
        gate: Gate,
        seed: int | None,
    ) -> int:
        with self._inside(gate):
            data = self._kv.export_blocks(source, layers)
            self.write(target, layers, data)
            return checksum_of(data, seed)

    def write(self, blocks: Sequence[int], layers: range, data: bytes | memoryview) -> None:
        """The write itself, whoever is inside."""
        some = self._pages[layers.start : layers.stop]
        pages = np.frombuffer(data, np.uint8).reshape(len(layers), some.shape[1], len(blocks), -1)
        some[:, :, list(blocks)] = pages

    def put(self, data: bytes, gate: Gate, seed: int | None) -> int:
        with self._inside(gate):
            self._beside[_GATES_BYTES : _GATES_BYTES + len(data)] = data
            return checksum_of(data, seed)

    def close(self) -> None:
        """The mappings go when no array is left of them."""
