"""A transport beside the library that carries it, round by round in turn on the same link."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from statistics import median

from tandem_bench.handoff.pair import MakeCache, Rate, Round, running_handoff

Library = Callable[[int], AbstractContextManager[dict[str, Round]]]
"""Makes the library ready to move so many bytes by itself: its ways, by name."""


@dataclass(frozen=True)
class Beside:
    """The rates of all ways, and the hand-off's share of each of the library's: round by round."""

    rates: list[Rate]
    shares: dict[str, float]


def measure_beside(transport: str, library: Library, make: MakeCache, rounds: int) -> Beside:
    """The hand-off with checksums and without, and the library's own ways, in turn.

    Raises CheckFailedError when bytes came out changed.
    """
    with ExitStack() as stack:
        ways: dict[str, Round] = {}
        num_bytes = 0
        for name, checksum in ((f"{transport}, checksum", True), (transport, False)):
            options = {"transport": transport, "checksum": checksum}
            ways[name], num_bytes = stack.enter_context(running_handoff(name, make, options))
        alone = stack.enter_context(library(num_bytes))
        handed = list(ways)
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
    return Beside([Rate.of(name, num_bytes, seconds[name]) for name in ways], shares)
