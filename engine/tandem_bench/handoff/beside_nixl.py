"""NIXL by itself: writes of as many bytes from one process to another, over what UCX_TLS allows.

Memory is registered once; nothing is packed, checked or unpacked. It writes in pieces of the
hand-off's size, two at a time, and all of it at once.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from tandem_bench.errors import CheckFailedError
from tandem_bench.handoff.beside import (
    PATTERN,
    PatternMemory,
    Pipe,
    running_target,
    write_in_pieces,
)
from tandem_bench.handoff.pair import Round
from tandem_engine.handoff.transports.nixl import NixlInbound
from tandem_engine.handoff.transports.nixl_agent import Agent
from tandem_engine.memory import MemoryRegion

PIECE_BYTES: Final = NixlInbound.least_slot_bytes


class _Registered(PatternMemory):
    """An agent of the library, and memory that is registered with it."""

    def __init__(self, name: str, num_bytes: int, value: int) -> None:
        super().__init__(num_bytes, value)
        self.agent = Agent(f"bench-{name}")
        self.region = MemoryRegion("host", self.address, num_bytes)
        self.described = self.agent.describe(self.agent.register(self.region))


def _be_target(pipe: Pipe, num_bytes: int) -> None:
    memory = _Registered("target", num_bytes, 0)
    pipe.send((memory.described, memory.address))
    pipe.recv()
    pipe.send(memory.is_filled())


def _wait(seconds: float) -> bool:
    time.sleep(seconds)
    return False


@contextmanager
def running_nixl(num_bytes: int) -> Iterator[dict[str, Round]]:
    """The library's ways, by name. Raises CheckFailedError when the bytes did not arrive."""
    with running_target(_be_target, num_bytes, "NIXL") as (described, target):
        memory = _Registered("source", num_bytes, PATTERN)
        peer = memory.agent.add(described)

        def write(at: int, size: int) -> None:
            source, there = (
                MemoryRegion("host", address + at, size) for address in (memory.address, target)
            )
            if not memory.agent.write(peer, source, there, _wait):
                raise CheckFailedError("NIXL's own write was not made")

        yield {
            "nixl alone, in pieces": partial(write_in_pieces, write, num_bytes, PIECE_BYTES),
            "nixl alone, whole": partial(write_in_pieces, write, num_bytes, num_bytes),
        }
