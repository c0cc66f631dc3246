"""The hand-off on one machine's CPU beside what it can't beat, all in one run, in turn.

P and D are two processes with the KV store of a CPU worker, as in a fleet. One prompt's KV moves in
one push, from blocks in random order to blocks in random order, so a rate is the path's own: pack,
checksum, transport, check, unpack. Every round is checked for its content. Beside `tcp` stand raw
sockets, beside `shm` copies of memory, beside `nixl` and `mooncake` their libraries alone. Shares
are of one round each; what is told is their median.
"""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Final

import msgspec
import torch

from tandem_bench.handoff.beside import Beside, Library, measure_beside
from tandem_bench.handoff.beside_mooncake import running_mooncake
from tandem_bench.handoff.beside_nixl import running_nixl
from tandem_bench.handoff.floors import running_copies, running_sockets
from tandem_bench.handoff.pair import Cache, Round, Side
from tandem_bench.options import option
from tandem_engine.handoff.errors import HandoffUnavailable, TransportError
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.runner.host_kv import HostKVStore
from tandem_wire.handoff import KVLayout

LAYOUT: Final = KVLayout(
    num_layers=16, num_kv_heads=8, head_dim=128, page_size=64, dtype="bfloat16", itemsize=2
)
SMALL_BLOCKS: Final = 8
"""A small prompt: what it takes is told in milliseconds."""


@contextmanager
def _sockets(num_bytes: int) -> Iterator[dict[str, Round]]:
    """With one stream, and with as many as a session has; these with the session's buffers too."""
    streams = HandoffSettings(worker_id="", boot_id="").num_streams
    with ExitStack() as stack:
        ways = stack.enter_context(running_sockets(num_bytes, 1))
        ways |= stack.enter_context(running_sockets(num_bytes, streams))
        ways |= stack.enter_context(running_sockets(num_bytes, streams, fitted=True))
        yield ways


FLOORS: Final[dict[str, Library]] = {
    "tcp": _sockets,
    "shm": running_copies,
    "nixl": running_nixl,
    "mooncake": running_mooncake,
}
"""What a transport can't beat, or is carried by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The hand-off on this machine's CPU beside sockets, copies and libraries in the same run."""

    megabytes: int = option(256, "KV of one prompt, in MiB.", minimum=4)
    rounds: int = option(5, "Measured rounds of each case.", minimum=1)
    shm_dir: str = option("/dev/shm", "Folder of the shared memory.")
    only: str = option("", "Transports, such as tcp,shm; empty: all.")


class HostCache(Cache):
    """A CPU worker's cache, all blocks in random order; the prefill side's hold a pattern."""

    def __init__(self, side: Side, num_blocks: int) -> None:
        self.kv: HostKVStore = HostKVStore(LAYOUT, num_blocks, torch.bfloat16)
        self._sent, self.blocks = (_shuffled(num_blocks, seed) for seed in (1, 2))
        if side == "prefill":
            self.blocks = self._sent
            self.kv.cache.copy_(_pattern(num_blocks))

    def clear(self) -> None:
        self.kv.cache.zero_()

    def is_right(self) -> bool:
        expected = _pattern(len(self.blocks)).view(torch.int16)
        found = self.kv.cache.view(torch.int16)
        return all(
            torch.equal(found[:, :, here], expected[:, :, there])
            for here, there in zip(self.blocks, self._sent, strict=True)
        )


def _shuffled(num_blocks: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).sample(range(num_blocks), num_blocks))


@cache
def _pattern(num_blocks: int) -> torch.Tensor:
    """A cache's content, no word of which is there twice."""
    shape = (
        LAYOUT.num_layers, LAYOUT.num_planes, num_blocks, LAYOUT.num_kv_heads, LAYOUT.page_size,
    )  # fmt: skip
    words = num_blocks * LAYOUT.block_bytes // 8
    return torch.arange(words).view(torch.bfloat16).view(*shape, LAYOUT.head_dim)


def make_cache(num_blocks: int, side: Side) -> Cache:
    """One side's cache."""
    return HostCache(side, num_blocks)


def run(options: Options) -> None:
    """Measure and print a table and a JSON line."""
    make = partial(make_cache, (options.megabytes << 20) // LAYOUT.block_bytes)
    found = []
    for transport in options.only.split(",") if options.only else FLOORS:
        settings = {"transport": transport, "shm_dir": options.shm_dir}
        try:
            beside = measure_beside(
                settings, FLOORS[transport], make, options.rounds, partial(make_cache, SMALL_BLOCKS)
            )
        except (TransportError, HandoffUnavailable) as error:
            print(f"{transport} is left out: {error}")
            continue
        _show(beside)
        found.append(beside)
    print(msgspec.json.encode(found).decode())


def _show(beside: Beside) -> None:
    for rate in beside.rates:
        print(
            f"{rate.name:32} best {rate.best:8.0f}  median {rate.median:8.0f} MB/s"
            f"  {rate.milliseconds:8.2f} ms"
        )
    for name, share in beside.shares.items():
        print(f"{name}: {100 * share:.0f} %")
