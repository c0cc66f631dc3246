"""What the CPU's links can't beat: bare sockets and plain copies of memory, round by round.

Each keeps its processes, threads and memory between rounds, as the hand-off does.
"""

import multiprocessing
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from tandem_bench.handoff.beside import Pipe
from tandem_bench.handoff.pair import Round
from tandem_engine.handoff.transports.tcp import PIECE_BYTES, fit_buffers

_ONE_BUFFER: Final = b"1"
_ALL_MEMORY: Final = b"a"
_Bytes = npt.NDArray[np.uint8]


def _serve_stream(stream: socket.socket, part: memoryview) -> None:
    """Send a part of the bytes whenever it is asked for."""
    while order := stream.recv(1):
        for at in range(0, len(part), PIECE_BYTES):
            piece = part[at : at + PIECE_BYTES]
            stream.sendall(piece if order == _ALL_MEMORY else part[: len(piece)])


def _send_from_sockets(port: int, num_bytes: int, streams: int, fitted: bool) -> None:
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]
    for stream in sockets if fitted else ():
        fit_buffers(stream)
    parts = _split(np.ones(num_bytes, np.uint8), streams)
    with ThreadPoolExecutor(streams) as lanes:
        list(lanes.map(_serve_stream, sockets, parts))


def _split(memory: _Bytes, streams: int) -> list[memoryview]:
    return [part.data for part in np.array_split(memory, streams)]


def _receive(stream: socket.socket, part: memoryview, order: bytes) -> None:
    stream.sendall(order)
    for at in range(0, len(part), PIECE_BYTES):
        piece = part[at : at + PIECE_BYTES]
        target = piece if order == _ALL_MEMORY else part[: len(piece)]
        if stream.recv_into(target, len(piece), socket.MSG_WAITALL) != len(piece):
            raise ConnectionError("the sender of the raw sockets has ended")


@contextmanager
def running_sockets(
    num_bytes: int, streams: int, *, fitted: bool = False
) -> Iterator[dict[str, Round]]:
    """TCP connections between two processes, in pieces of the hand-off's size, nothing else done.

    Either from one buffer to one buffer, for each stream, again and again: both stay in the CPU's
    cache; or from memory of all the bytes to memory of all the bytes, as KV is.

    Args:
        fitted: the sockets' buffers are those of the hand-off, else the kernel's own.
    """
    server = socket.create_server(("127.0.0.1", 0))
    child = multiprocessing.get_context("spawn").Process(
        target=_send_from_sockets,
        args=(server.getsockname()[1], num_bytes, streams, fitted),
        daemon=True,
    )
    child.start()
    sockets = [server.accept()[0] for _ in range(streams)]
    server.close()
    for stream in sockets if fitted else ():
        fit_buffers(stream)
    parts = _split(np.ones(num_bytes, np.uint8), streams)

    def move(lanes: ThreadPoolExecutor, order: bytes) -> float:
        started = time.perf_counter()
        list(lanes.map(partial(_receive, order=order), sockets, parts))
        return time.perf_counter() - started

    name = f"raw socket, {streams} stream{'s' if streams > 1 else ''}"
    name += ", fitted" if fitted else ""
    with ThreadPoolExecutor(streams) as lanes:
        yield {
            f"{name}, one buffer": partial(move, lanes, _ONE_BUFFER),
            f"{name}, all memory": partial(move, lanes, _ALL_MEMORY),
        }
    for stream in sockets:
        stream.close()
    child.join()


class _Copy:
    """One process's two pieces of memory, and the copy between them."""

    def __init__(self, num_bytes: int) -> None:
        self.source, self.target = (np.full(num_bytes, byte, np.uint8) for byte in (1, 2))

    def half(self) -> None:
        middle = len(self.source) // 2
        np.copyto(self.target[:middle], self.source[:middle])

    def all(self) -> None:
        np.copyto(self.target, self.source)


def _copy_when_told(pipe: Pipe, num_bytes: int) -> None:
    copy = _Copy(num_bytes)
    copy.all()
    pipe.send(None)
    while pipe.recv():
        copy.half()
        pipe.send(None)


@contextmanager
def running_copies(num_bytes: int) -> Iterator[dict[str, Round]]:
    """Plain copies: all bytes by one process, or half of them by each of two at the same time.

    And the checksum of all bytes, which each side of a hand-off makes.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_copy_when_told, args=(theirs, num_bytes), daemon=True)
    child.start()
    copy = _Copy(num_bytes)
    told: Any = ours
    told.recv()

    def by_two() -> None:
        told.send(True)
        copy.half()
        told.recv()

    yield {
        "memory copy, 1 process": partial(_timed, copy.all),
        "memory copy, 2 processes": partial(_timed, by_two),
        "checksum, 1 process": partial(_timed, partial(xxhash.xxh3_64_intdigest, copy.source.data)),
    }
    told.send(False)
    child.join()


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
