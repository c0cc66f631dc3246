"""Mooncake's transfer engine by itself: writes of as many bytes between two processes, over TCP.

Memory is registered once; nothing is packed, checked or unpacked. It writes in pieces of the
hand-off's size, two at a time, polled; whole, by its `transfer_sync_write`; and by the benchmark
program that comes with it, 16 times 1 MiB in flight in each of two threads, which was its best of
six settings on two cores.
"""

import ctypes
import mmap
import multiprocessing
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from tandem_bench.errors import CheckFailedError
from tandem_bench.handoff.pair import Round
from tandem_engine.handoff.transports import transfer_engine

NUM_LANES: Final = 2
_HOST: Final = "127.0.0.1"
_PATTERN: Final = 0x5A
_POLL_SECONDS: Final = 200e-6


class _Registered:
    """An engine of the library, and memory that is registered with it."""

    def __init__(self, num_bytes: int, value: int) -> None:
        self.engine: Any = transfer_engine.load().TransferEngine()
        if self.engine.initialize(_HOST, "P2PHANDSHAKE", "tcp", ""):
            raise CheckFailedError("Mooncake's transfer engine does not start")
        self._map = mmap.mmap(-1, num_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        ctypes.memset(self.address, value, num_bytes)
        if self.engine.register_memory(self.address, num_bytes):
            raise CheckFailedError(f"Mooncake can't register {num_bytes} bytes")

    @property
    def name(self) -> str:
        """By which a peer reaches it."""
        return f"{_HOST}:{self.engine.get_rpc_port()}"

    def is_filled(self) -> bool:
        """Whether all of it is the pattern."""
        return self._map[:] == bytes([_PATTERN]) * len(self._map)


def _be_target(pipe: "Connection[Any, Any]", num_bytes: int) -> None:
    memory = _Registered(num_bytes, 0)
    pipe.send((memory.name, memory.address))
    pipe.recv()
    pipe.send(memory.is_filled())


def _write_pieces(
    memory: _Registered, peer: str, target: int, num_bytes: int, piece_bytes: int
) -> float:
    engine, source = memory.engine, memory.address

    def write(first: int) -> None:
        for at in range(first, num_bytes, NUM_LANES * piece_bytes):
            size = min(piece_bytes, num_bytes - at)
            number = engine.transfer_submit_write(peer, source + at, target + at, size)
            while number and not engine.transfer_check_status(number):
                time.sleep(_POLL_SECONDS)

    lanes = [
        threading.Thread(target=write, args=(number * piece_bytes,)) for number in range(NUM_LANES)
    ]
    started = time.perf_counter()
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    return time.perf_counter() - started


def _write_whole(memory: _Registered, peer: str, target: int, num_bytes: int) -> float:
    started = time.perf_counter()
    memory.engine.transfer_sync_write(peer, memory.address, target, num_bytes)
    return time.perf_counter() - started


def _run_its_benchmark(peer: str, num_bytes: int) -> float:
    """The seconds that `num_bytes` take at the rate that it reports after a second."""
    program = Path(transfer_engine.load().__file__).parent / "transfer_engine_bench"
    options = {
        "mode": "initiator", "operation": "write", "metadata_server": "P2PHANDSHAKE",
        "protocol": "tcp", "local_server_name": _HOST, "segment_id": peer, "duration": 1,
        "buffer_size": num_bytes, "block_size": 1 << 20,
        "batch_size": min(16, num_bytes >> 21), "threads": 2, "report_unit": "MB",
    }  # fmt: skip
    command = [str(program), *(f"--{name}={value}" for name, value in options.items())]
    environment = os.environ | {"MC_LOG_LEVEL": "INFO", "GLOG_minloglevel": "0"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    found = re.search(r"throughput ([0-9.]+) MB/s", done.stderr + done.stdout)
    if found is None:
        raise CheckFailedError(f"{program.name} failed: {done.stderr[-500:]}")
    return num_bytes / 1e6 / float(found[1])


@contextmanager
def running_mooncake(num_bytes: int) -> Iterator[dict[str, Round]]:
    """The library's own ways, by name.

    Raises:
        TransportError: the library is not here, or can't be used.
        CheckFailedError: the bytes did not arrive.
    """
    transfer_engine.load()
    piece_bytes = transfer_engine.PIECE_BYTES
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_be_target, args=(theirs, num_bytes), daemon=True)
    child.start()
    peer, target = ours.recv()
    memory = _Registered(num_bytes, _PATTERN)
    yield {
        "mooncake alone, in pieces": partial(
            _write_pieces, memory, peer, target, num_bytes, piece_bytes
        ),
        "mooncake alone, whole": partial(_write_whole, memory, peer, target, num_bytes),
        "mooncake alone, its benchmark": partial(_run_its_benchmark, peer, num_bytes),
    }
    _write_pieces(memory, peer, target, num_bytes, piece_bytes)
    ours.send(None)
    if not ours.recv():
        raise CheckFailedError("what Mooncake's transfer engine wrote by itself did not arrive")
    child.join()
