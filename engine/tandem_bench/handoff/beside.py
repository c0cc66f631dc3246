"""A transport beside what it can't beat, round by round in turn on the same link."""

import ctypes
import mmap
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, Final, TypeAlias

from tandem_bench.errors import CheckFailedError
from tandem_bench.handoff.pair import MakeCache, Rate, Round, running_handoff

Library = Callable[[int], AbstractContextManager[dict[str, Round]]]
"""Makes a library or another floor ready to move so many bytes by itself: its ways, by name."""


NUM_LANES: Final = 2
PATTERN: Final = 0x5A


class PatternMemory:
    """Memory of one process that a library writes from, or to."""

    def __init__(self, num_bytes: int, value: int) -> None:
        self._map = mmap.mmap(-1, num_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        ctypes.memset(self.address, value, num_bytes)

    def is_filled(self) -> bool:
        """Whether all of it is the pattern."""
        return self._map[:] == bytes([PATTERN]) * len(self._map)


Pipe: TypeAlias = "Connection[Any, Any]"
BeTarget = Callable[[Pipe, int], None]
"""Runs in a child: sends what a writer needs to know, waits for a word, says if all arrived."""


@contextmanager
def running_target(be_target: BeTarget, num_bytes: int, library: str) -> Iterator[Any]:
    """The process that is written to; what it says of itself.

    Raises CheckFailedError when the bytes did not arrive.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=be_target, args=(theirs, num_bytes), daemon=True)
    child.start()
    yield ours.recv()
    ours.send(None)
    if not ours.recv():
        raise CheckFailedError(f"what {library} wrote by itself did not arrive")
    child.join()


def write_in_pieces(write: Callable[[int, int], None], num_bytes: int, piece_bytes: int) -> float:
    """Seconds for all pieces, two at a time; `write` takes where one begins, and its size."""

    def write_some(first: int) -> None:
        for at in range(first, num_bytes, NUM_LANES * piece_bytes):
            write(at, min(piece_bytes, num_bytes - at))

    lanes = [
        threading.Thread(target=write_some, args=(number * piece_bytes,))
        for number in range(NUM_LANES)
    ]
    started = time.perf_counter()
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Beside:
    """The rates of all ways, and the hand-off's share of each of the floor's: round by round."""

    rates: list[Rate]
    shares: dict[str, float]


def measure_beside(
    settings: dict[str, Any], floor: Library, make: MakeCache, rounds: int, make_small: MakeCache
) -> Beside:
    """The hand-off with checksums and without, a small prompt, and the floor's ways, in turn.

    Args:
        settings: of the hand-off, with its transport.
        make_small: the cache of a prompt of which the time counts, not the rate.

    Raises CheckFailedError when bytes came out changed.
    """
    transport = settings["transport"]
    with ExitStack() as stack:
        ways: dict[str, Round] = {}
        sizes: dict[str, int] = {}

        def add(name: str, make: MakeCache, checksum: bool) -> None:
            options = settings | {"checksum": checksum}
            ways[name], sizes[name] = stack.enter_context(running_handoff(name, make, options))

        add(f"{transport}, checksum", make, checksum=True)
        add(transport, make, checksum=False)
        handed, num_bytes = list(ways), sizes[transport]
        add(f"{transport}, checksum, small", make_small, checksum=True)
        alone = stack.enter_context(floor(num_bytes))
        ways |= alone
        for way in ways.values():
            way()  # dials, and faults pages in
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                seconds[name].append(way())
    shares = {
        f"{ours} / {theirs}": median(
            least / took for least, took in zip(seconds[theirs], seconds[ours], strict=True)
        )
        for ours in handed
        for theirs in alone
    }
    rates = [Rate.of(name, sizes.get(name, num_bytes), seconds[name]) for name in ways]
    return Beside(rates, shares)
