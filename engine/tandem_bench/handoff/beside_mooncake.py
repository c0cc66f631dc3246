"""Mooncake's transfer engine by itself: writes of as many bytes between two processes, over TCP.

Memory is registered once; nothing is packed, checked or unpacked. It writes in pieces of the
hand-off's size, two at a time, polled; whole, by its `transfer_sync_write`; and by the benchmark
program that comes with it, 16 times 1 MiB in flight in each of two threads, which was its best of
six settings on two cores.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from tandem_bench.errors import CheckFailedError
from tandem_bench.handoff.beside import (
    PATTERN,
    PatternMemory,
    Pipe,
    running_target,
    write_in_pieces,
)
from tandem_bench.handoff.pair import Round
from tandem_engine.handoff.transports import transfer_engine

_HOST: Final = "127.0.0.1"
_POLL_SECONDS: Final = 200e-6


class _Registered(PatternMemory):
    """An engine of the library, and memory that is registered with it."""

    def __init__(self, num_bytes: int, value: int) -> None:
        super().__init__(num_bytes, value)
        self.engine: Any = transfer_engine.load().TransferEngine()
        if self.engine.initialize(_HOST, "P2PHANDSHAKE", "tcp", ""):
            raise CheckFailedError("Mooncake's transfer engine does not start")
        if self.engine.register_memory(self.address, num_bytes):
            raise CheckFailedError(f"Mooncake can't register {num_bytes} bytes")

    @property
    def name(self) -> str:
        """By which a peer reaches it."""
        return f"{_HOST}:{self.engine.get_rpc_port()}"


def _be_target(pipe: Pipe, num_bytes: int) -> None:
    memory = _Registered(num_bytes, 0)
    pipe.send((memory.name, memory.address))
    pipe.recv()
    pipe.send(memory.is_filled())


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
    with running_target(_be_target, num_bytes, "Mooncake's transfer engine") as (peer, target):
        memory = _Registered(num_bytes, PATTERN)

        def write(at: int, size: int) -> None:
            engine = memory.engine
            number = engine.transfer_submit_write(peer, memory.address + at, target + at, size)
            while number and not engine.transfer_check_status(number):
                time.sleep(_POLL_SECONDS)

        pieces = partial(write_in_pieces, write, num_bytes, transfer_engine.PIECE_BYTES)
        yield {
            "mooncake alone, in pieces": pieces,
            "mooncake alone, whole": partial(_write_whole, memory, peer, target, num_bytes),
            "mooncake alone, its benchmark": partial(_run_its_benchmark, peer, num_bytes),
        }
        pieces()  # its benchmark has written over the pattern
