"""Memory of a KV store as a transport sees it: what it may register, and where pages are staged."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
