"""Hand-off MB/s on loopback, against a raw socket and a plain copy in the same run.

P and D are two processes, as in a fleet. One prompt's KV moves in one push, so the figure is the
path's own: export, checksum, transport, check, import. Every round is checked for its content.
"""

import multiprocessing
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import msgspec
import numpy as np

from tandem_bench.handoff.beside import Library, measure_beside
from tandem_bench.handoff.beside_mooncake import running_mooncake
from tandem_bench.handoff.beside_nixl import running_nixl
from tandem_bench.handoff.pair import Cache, MakeCache, Rate, Side, measure_handoff, transports
from tandem_bench.options import option
from tandem_engine.handoff.errors import HandoffUnavailable, TransportError
from tandem_engine.step import KVStore
from tandem_wire.handoff import KVLayout

LAYOUT: Final = KVLayout(
    num_layers=16, num_kv_heads=8, head_dim=128, page_size=64, dtype="bfloat16", itemsize=2
)
_PIECE: Final = 4 << 20
LIBRARIES: Final[dict[str, Library]] = {"nixl": running_nixl, "mooncake": running_mooncake}
"""What carries a transport, by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Hand-off MB/s on loopback, against a raw socket and a plain copy in the same run."""

    megabytes: int = option(256, "KV of one prompt, in MiB.", minimum=4)
    rounds: int = option(5, "Measured rounds of each case.", minimum=1)
    shm_dir: str = option("/dev/shm", "Folder of the shared memory.")


class BytesKVStore(KVStore):
    """Plain bytes, as an array [layer, K/V, block, page bytes]."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        shape = (layout.num_layers, layout.num_planes, num_blocks, layout.page_bytes)
        self.data = np.zeros(shape, np.uint8)

    def _pages(self, blocks: Sequence[int], layers: range) -> tuple[int, int, int, int]:
        return (len(layers), self.layout.num_planes, len(blocks), self.layout.page_bytes)

    def export_blocks(self, blocks: Sequence[int], layers: range) -> memoryview:
        return self.data[layers.start : layers.stop, :, list(blocks)].reshape(-1).data

    def export_into(self, blocks: Sequence[int], layers: range, out: memoryview) -> None:
        target = np.frombuffer(out, np.uint8).reshape(self._pages(blocks, layers))
        source = self.data[layers.start : layers.stop]
        # Page by page: large copies that release the interpreter, and no temporary array.
        np.take(source, list(blocks), axis=2, out=target, mode="clip")

    def import_blocks(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        pages = np.frombuffer(data, np.uint8).reshape(self._pages(blocks, layers))
        self.data[layers.start : layers.stop, :, list(blocks)] = pages


class BytesCache(Cache):
    """Plain bytes, all blocks in order."""

    def __init__(self, side: Side, num_blocks: int) -> None:
        self.kv: BytesKVStore = BytesKVStore(LAYOUT, num_blocks)
        self.blocks = tuple(range(num_blocks))
        self._expected = BytesKVStore(LAYOUT, num_blocks if side == "decode" else 0)
        _fill(self._expected if side == "decode" else self.kv)

    def clear(self) -> None:
        self.kv.data[:] = 0

    def is_right(self) -> bool:
        return np.array_equal(self.kv.data, self._expected.data)


def _fill(kv: BytesKVStore) -> None:
    words = kv.data.view(np.uint64)
    words[:] = np.arange(words.size, dtype=np.uint64).reshape(words.shape)


def make_cache(num_blocks: int, side: Side) -> Cache:
    """One side's cache."""
    return BytesCache(side, num_blocks)


def _raw_sender(port: int, num_bytes: int, rounds: int, streams: int) -> None:
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]
    data = bytes(_PIECE)

    def send(stream: socket.socket) -> None:
        for _ in range(num_bytes // streams // _PIECE):
            stream.sendall(data)

    for _ in range(rounds):
        for stream in sockets:
            stream.recv(1)
        threads = [threading.Thread(target=send, args=(stream,)) for stream in sockets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def measure_raw_socket(num_bytes: int, rounds: int, streams: int) -> Rate:
    """`streams` TCP connections between two processes, into one buffer each, nothing else done."""
    server = socket.create_server(("127.0.0.1", 0))
    child = multiprocessing.get_context("spawn").Process(
        target=_raw_sender, args=(server.getsockname()[1], num_bytes, rounds, streams)
    )
    child.start()
    sockets = [server.accept()[0] for _ in range(streams)]
    server.close()

    def receive(stream: socket.socket) -> None:
        buffer = memoryview(bytearray(_PIECE))
        for _ in range(num_bytes // streams // _PIECE):
            stream.recv_into(buffer, _PIECE, socket.MSG_WAITALL)

    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        threads = [threading.Thread(target=receive, args=(stream,)) for stream in sockets]
        for stream, thread in zip(sockets, threads, strict=True):
            stream.sendall(b"g")
            thread.start()
        for thread in threads:
            thread.join()
        seconds.append(time.perf_counter() - started)
    child.join()
    return Rate.of(f"raw socket, {streams} stream(s)", num_bytes, seconds)


def measure_copy(num_bytes: int, rounds: int) -> Rate:
    """One thread copying memory."""
    source, target = np.ones(num_bytes, np.uint8), np.empty(num_bytes, np.uint8)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - started)
    return Rate.of("memory copy, 1 thread", num_bytes, seconds)


def run(options: Options) -> None:
    """Measure and print a table and a JSON line."""
    num_bytes, rounds = options.megabytes << 20, options.rounds
    make = partial(make_cache, num_bytes // LAYOUT.block_bytes)
    rates = [measure_copy(num_bytes, rounds)]
    rates += [measure_raw_socket(num_bytes, rounds, streams) for streams in (1, 2)]
    rates += [
        measure_handoff(name, make, rounds, settings)
        for name, settings in transports(options.shm_dir).items()
    ]
    raw = max(rate.best for rate in rates if rate.name.startswith("raw"))
    for name, library in LIBRARIES.items():
        rates += _show_beside(name, library, make, rounds)
    for rate in rates:
        share = 100 * rate.best / raw
        print(
            f"{rate.name:24} best {rate.best:8.0f}  median {rate.median:8.0f} MB/s {share:5.0f} %"
        )
    print(msgspec.json.encode(rates).decode())


def _show_beside(transport: str, library: Library, make: MakeCache, rounds: int) -> list[Rate]:
    """Its shares of what its library does alone, or why there are none."""
    try:
        beside = measure_beside(transport, library, make, rounds)
    except (TransportError, HandoffUnavailable) as error:
        print(f"{transport} is left out: {error}")
        return []
    for name, share in beside.shares.items():
        print(f"{name}: {100 * share:.0f} %, the median of {rounds} rounds in turn")
    return beside.rates
