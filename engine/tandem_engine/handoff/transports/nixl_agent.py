"""The library NIXL: an agent of it with the backend UCX, from whichever wheel is installed.

Its own Python class is passed over: that one's progress thread polls without a pause, which takes a
whole core of an idle worker. Ours sleeps until UCX has something to do.
"""

import importlib
import importlib.metadata
import os
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from tandem_engine.handoff.errors import TransportError
from tandem_engine.memory import MemoryRegion

_PROGRESS_MICROSECONDS: Final = 10_000
"""The progress thread looks this often even if UCX has woken it by no event."""
_FIRST_WAIT: Final = 20e-6
_LONGEST_WAIT: Final = 1e-3
_SPIN_SECONDS: Final = 1e-3
"""A write from GPU to GPU of one host is over by then: a pause, of at least 80 microseconds, would
add much to it."""


class Agent:
    """Registers memory, knows agents of other processes, and writes to their memory.

    Every method but the first raises one of the library's errors, which have no common base. Any
    thread may call any method.
    """

    def __init__(self, name: str) -> None:
        """Raises TransportError when this process can't have one."""
        library = _load()
        self.name = name
        self.version = importlib.metadata.version(library.__name__.partition(".")[0])
        self._library: Any = library.nixlBind
        config = self._library.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = _PROGRESS_MICROSECONDS
        config.syncMode = self._library.NIXL_THREAD_SYNC_RW
        try:
            self._agent: Any = self._library.nixlAgent(name, config)
            self._agent.createBackend("UCX", {})
        except Exception as error:
            raise TransportError(
                f"can't make an agent of nixl with UCX: {error}; check UCX_TLS and UCX_NET_DEVICES"
            ) from error

    def register(self, region: MemoryRegion) -> object:
        """Let the library use this memory; what `unregister` and `describe` need."""
        place = (region.address, region.num_bytes, region.device, "")
        memory = self._library.nixlRegDList(self._segment(region), [place])
        self._agent.registerMem(memory, [])
        return memory

    def _segment(self, region: MemoryRegion) -> Any:
        library = self._library
        return library.VRAM_SEG if region.kind == "cuda" else library.DRAM_SEG

    def unregister(self, registration: object) -> None:
        """Take memory back."""
        self._agent.deregisterMem(registration, [])

    def describe(self, registration: object) -> bytes:
        """What another agent needs to write to this memory."""
        described: bytes = self._agent.getLocalPartialMD(registration, True, [])
        return described

    def add(self, described: bytes) -> str:
        """Take in what another agent has described; its name."""
        name: bytes = self._agent.loadRemoteMD(described)
        return name.decode()

    def knows(self, name: str) -> bool:
        """Whether that agent was added and not removed since."""
        nothing = self._library.nixlXferDList(self._library.DRAM_SEG)
        found = self._agent.checkRemoteMD(name, nothing)
        return bool(found == self._library.NIXL_SUCCESS)

    def remove(self, name: str) -> None:
        """Forget an agent, and what connects this one with it."""
        self._agent.invalidateRemoteMD(name)

    def write(
        self,
        peer: str,
        source: MemoryRegion,
        target: MemoryRegion,
        is_stopped: Callable[[float], bool],
    ) -> bool:
        """Write memory from here to as many bytes at `peer`; True: they are there.

        `is_stopped` waits so many seconds, and says whether to give up.
        """
        mine, theirs = (
            self._library.nixlXferDList(
                self._segment(region), [(region.address, region.num_bytes, region.device)]
            )
            for region in (source, target)
        )
        handle = self._agent.createXferReq(self._library.NIXL_WRITE, mine, theirs, peer, "", [])
        try:
            state = self._agent.postXferReq(handle, "")
            if source.kind == "cuda":
                state = self._spin(handle, state)
            seconds = _FIRST_WAIT
            while state == self._library.NIXL_IN_PROG and not is_stopped(seconds):
                state = self._agent.getXferStatus(handle)
                seconds = min(2 * seconds, _LONGEST_WAIT)
        finally:
            self._agent.releaseXferReq(handle)  # gives up what is under way
        return bool(state == self._library.NIXL_SUCCESS)

    def _spin(self, handle: object, state: object) -> object:
        """Look without a pause, other threads' turns in between, for a short while."""
        end = time.perf_counter() + _SPIN_SECONDS
        while state == self._library.NIXL_IN_PROG and time.perf_counter() < end:
            state = self._agent.getXferStatus(handle)
        return state


def is_installed() -> bool:
    """Whether this process can load the library."""
    try:
        _load()
    except TransportError:
        return False
    return True


def _load() -> ModuleType:
    """The library's module. Raises TransportError when it is not installed, or doesn't load."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # else it greets on standard output
    for name in ("nixl", "nixl_cu13", "nixl_cu12"):  # the first one takes that of torch's CUDA
        try:
            return importlib.import_module(f"{name}._api")
        except ModuleNotFoundError as error:
            if error.name not in (name, f"{name}._api"):
                raise TransportError(f"nixl can't be loaded: {error}") from error
        except ImportError as error:
            raise TransportError(f"nixl can't be loaded: {error}") from error
    raise TransportError("nixl is not installed; pip install 'tandem-inference[nixl]'")
