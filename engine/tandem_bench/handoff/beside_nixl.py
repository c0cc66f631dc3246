"""NIXL by itself: writes of as many bytes from one process to another, over what UCX_TLS allows.

Memory is registered once; nothing is packed, checked or unpacked. It writes in pieces of the
hand-off's size, two at a time, and all of it at once.
"""

import ctypes
import mmap
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final

from tandem_bench.errors import CheckFailedError
from tandem_bench.handoff.pair import Round
from tandem_engine.handoff.transports.nixl import NixlInbound
from tandem_engine.handoff.transports.nixl_agent import Agent

NUM_LANES: Final = 2
PIECE_BYTES: Final = NixlInbound.least_slot_bytes
_PATTERN: Final = 0x5A


class _Registered:
    """An agent of the library, and memory that is registered with it."""

    def __init__(self, name: str, num_bytes: int, value: int) -> None:
        self.agent = Agent(f"bench-{name}")
        self._map = mmap.mmap(-1, num_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        ctypes.memset(self.address, value, num_bytes)
        self.described = self.agent.describe(self.agent.register(self.address, num_bytes))

    def write(self, peer: str, source: int, target: int, num_bytes: int) -> None:
        """Returns when the bytes are in the peer's memory."""
        if not self.agent.write(peer, source, target, num_bytes, _wait):
            raise CheckFailedError("NIXL's own write was not made")

    def is_filled(self) -> bool:
        """Whether all of it is the pattern."""
        return self._map[:] == bytes([_PATTERN]) * len(self._map)


def _wait(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _be_target(pipe: "Connection[Any, Any]", num_bytes: int) -> None:
    memory = _Registered("target", num_bytes, 0)
    pipe.send((memory.described, memory.address))
    pipe.recv()
    pipe.send(memory.is_filled())


def _write(memory: _Registered, peer: str, target: int, num_bytes: int, piece_bytes: int) -> float:
    def write(first: int) -> None:
        for at in range(first, num_bytes, NUM_LANES * piece_bytes):
            memory.write(peer, memory.address + at, target + at, min(piece_bytes, num_bytes - at))

    lanes = [
        threading.Thread(target=write, args=(number * piece_bytes,)) for number in range(NUM_LANES)
    ]
    started = time.perf_counter()
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    return time.perf_counter() - started


@contextmanager
def running_nixl(num_bytes: int) -> Iterator[dict[str, Round]]:
    """The library's ways, by name. Raises CheckFailedError when the bytes did not arrive."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_be_target, args=(theirs, num_bytes), daemon=True)
    child.start()
    described, target = ours.recv()
    memory = _Registered("source", num_bytes, _PATTERN)
    peer = memory.agent.add(described)
    write = partial(_write, memory, peer, target, num_bytes)
    yield {
        "nixl alone, in pieces": partial(write, PIECE_BYTES),
        "nixl alone, whole": partial(write, num_bytes),
    }
    ours.send(None)
    if not ours.recv():
        raise CheckFailedError("what NIXL wrote by itself did not arrive")
    child.join()
