"""Memory of a KV store as a transport sees it: what it may register, where pages are staged, and a
cache that another process writes to itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from tandem_engine.errors import StagingUnavailableError

MemoryKind = Literal["host", "cuda"]


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One contiguous piece of a cache, in this process's addresses."""

    kind: MemoryKind
    address: int
    num_bytes: int
    device: int = 0
    """The GPU's number, as this process counts them."""


class Staging(ABC):
    """Memory that two processes of one host map, with the ways of pages in and out of it.

    The process that made it owns it; the other one maps it by its descriptor. It is never a part of
    a cache: a mapping can't be revoked, so a process that is taken for dead may write to it when it
    wakes. Both ends compute the same checksums only if their kinds are the same.

    Every method but `close` may be called from several threads at once, for different places, and
    has finished with the memory when it returns, also by an error. `at` counts bytes from the
    start. `seed` is that of the checksum of the packed bytes, which is returned; with None nothing
    is computed, and 0 is returned.
    """

    kind: ClassVar[MemoryKind]
    num_bytes: int
    num_lanes: int = 2
    """Writes at a time that fill the link."""

    @abstractmethod
    def descriptor(self) -> int:
        """An open file descriptor by which another process maps this memory; ours to keep."""

    @abstractmethod
    def stage(self, blocks: Sequence[int], layers: range, at: int, seed: int | None) -> int:
        """Pack some layers of the store's `blocks` here."""

    @abstractmethod
    def unstage(self, blocks: Sequence[int], layers: range, at: int, seed: int | None) -> int:
        """Put packed pages from here into the store's `blocks`."""

    @abstractmethod
    def put(self, data: bytes, at: int, seed: int | None) -> int:
        """Copy bytes of the host here."""

    @abstractmethod
    def get(self, num_bytes: int, at: int, seed: int | None) -> tuple[bytes, int]:
        """Copy from here to the host; the bytes and their checksum."""

    @abstractmethod
    def close(self) -> None:
        """Unmap it here; nothing of it is in use. Safe to call twice."""


class OwnStaging(Staging):
    """Staging memory that no other process maps: one writes there, or reads, through a library."""

    region: MemoryRegion
    """What the library is told of it."""

    def descriptor(self) -> int:
        raise StagingUnavailableError("memory of one process has no descriptor")


@dataclass(frozen=True, slots=True)
class Gate:
    """What a writer needs to be admitted to an `OpenCache`: a gate's number and its generation."""

    number: int
    generation: int


class OpenCache(ABC):
    """D's side of a cache into which other processes write pages themselves, through gates.

    A mapping can't be revoked, but a gate can: every writer enters a gate before its first byte and
    leaves it after the last one, and one that comes after `shut` is not let in, whenever its launch
    was made. Beside the cache there is scratch room, for pages that are part of no cache.

    `check` and `read_scratch` may be called from several threads at once.
    """

    details: Mapping[str, str | int]
    """What another process must know to map it, for `KVStore.map_cache`."""
    scratch_bytes: int

    @abstractmethod
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors by which another process maps cache, gates and scratch; ours to keep."""

    @abstractmethod
    def open_gate(self) -> Gate:
        """A gate that no one uses. Raises StagingUnavailableError when there is none."""

    @abstractmethod
    def shut(self, gate: Gate) -> None:
        """Let no one in any more. Who is inside may still write: see `num_inside`."""

    @abstractmethod
    def num_inside(self, gate: Gate) -> int:
        """Writers that have not left, of whatever generation; once 0 after `shut`, it stays so."""

    @abstractmethod
    def give_back(self, gate: Gate) -> None:
        """The gate is shut and no one is inside: another session may have it."""

    @abstractmethod
    def check(self, blocks: Sequence[int], layers: range, seed: int) -> int:
        """The checksum of pages where they are, as if they were packed."""

    @abstractmethod
    def read_scratch(self, num_bytes: int, seed: int | None) -> tuple[bytes, int]:
        """The first bytes of the scratch room, and their checksum (0 without a seed)."""

    @abstractmethod
    def close(self) -> None:
        """Give back gates and scratch; the cache stays its store's. Safe to call twice."""


class PeerCache(ABC):
    """P's side: another process's `OpenCache`, mapped here. Threads as for `OpenCache`.

    Both ways of writing return the checksum of the packed bytes, 0 without a seed. They have
    finished with the memory when they return, and raise GateShutError if the gate was shut: an
    unknown part of the bytes has been written then, before it was.
    """

    num_lanes: int = 2
    write_bytes: int = 1 << 20
    """A good size of one push."""

    @abstractmethod
    def push(
        self,
        source: Sequence[int],
        target: Sequence[int],
        layers: range,
        gate: Gate,
        seed: int | None,
    ) -> int:
        """Write some layers of our store's `source` blocks into the cache's `target` blocks."""

    @abstractmethod
    def put(self, data: bytes, gate: Gate, seed: int | None) -> int:
        """Write bytes to the start of the scratch room."""

    @abstractmethod
    def close(self) -> None:
        """Unmap it. Safe to call twice."""
