"""Hand-off MB/s on loopback, against a raw socket and a plain copy in the same run.

    python -m tandem_engine.handoff.bench [--megabytes 256] [--rounds 5] [--shm-dir /dev/shm]

P and D are two processes, as in a fleet. One prompt's KV moves in one push, so the figure is the
path's own: export, checksum, transport, check, import. Every round is checked for its content.
"""

import argparse
import multiprocessing
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

import msgspec
import numpy as np

from tandem_engine.handoff.bytes_store import BytesKVStore
from tandem_engine.handoff.events import (
    FetchDone,
    FetchFailed,
    FetchRequest,
    PrefillArrived,
    PushChunk,
)
from tandem_engine.handoff.service import HandoffService, start_handoff
from tandem_engine.handoff.settings import HandoffSettings
from tandem_wire.handoff import KVLayout
from tandem_wire.messages import PrefillPeer, SamplingParams

LAYOUT = KVLayout(
    num_layers=16, num_kv_heads=8, head_dim=128, page_size=64, dtype="bfloat16", itemsize=2
)
_PIECE = 4 << 20


@dataclass(frozen=True)
class Rate:
    """One line of the result; rates in MB/s (1e6 bytes)."""

    name: str
    best: float
    median: float


def _rate(name: str, num_bytes: int, seconds: list[float]) -> Rate:
    ordered = sorted(seconds)
    return Rate(name, num_bytes / ordered[0] / 1e6, num_bytes / ordered[len(ordered) // 2] / 1e6)


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
    return _rate(f"raw socket, {streams} stream(s)", num_bytes, seconds)


def _make(name: str, num_blocks: int, options: dict[str, Any]) -> tuple[BytesKVStore, Any]:
    kv = BytesKVStore(LAYOUT, num_blocks)
    settings = HandoffSettings(worker_id=name, boot_id="bench", host="127.0.0.1", **options)
    return kv, start_handoff(settings, kv, "bench")


def _fill(kv: BytesKVStore) -> None:
    words = kv.data.view(np.uint64)
    words[:] = np.arange(words.size, dtype=np.uint64).reshape(words.shape)


def _prefill_worker(pipe: "Pipe[int | None, int | None]", num_blocks: int, options: Any) -> None:
    kv, handoff = _make("p", num_blocks, options)
    _fill(kv)
    wake = threading.Event()
    handoff.wake_on_event(wake)
    pipe.send(handoff.bootstrap_port)
    while not pipe.poll(0):
        wake.wait(0.05)
        wake.clear()
        for event in handoff.poll():
            if isinstance(event, PrefillArrived):
                tokens = len(event.request.tokens)
                blocks = tuple(range(num_blocks))
                handoff.post(PushChunk(event.key, 0, tokens, blocks, last=True, first_token=1))
    handoff.close()


def fetch(
    handoff: HandoffService,
    wake: threading.Event,
    rid: str,
    port: int,
    blocks: Sequence[int],
    page_size: int,
) -> float:
    """Seconds until the worker at `port` has filled `blocks`. Raises RuntimeError."""
    tokens = tuple(range(len(blocks) * page_size))
    started = time.perf_counter()
    handoff.post(
        FetchRequest(
            rid=rid,
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            num_skip_tokens=0,
            blocks=tuple(blocks),
            params=SamplingParams(max_tokens=1),
            peers=(PrefillPeer("p", "127.0.0.1", port),),
        )
    )
    while True:
        wake.wait(30)
        wake.clear()
        for event in handoff.poll():
            if isinstance(event, FetchFailed):
                raise RuntimeError(event.message)
            if isinstance(event, FetchDone):
                return time.perf_counter() - started


def measure_handoff(name: str, num_bytes: int, rounds: int, **options: Any) -> Rate:
    """Fetches of `num_bytes` from a second process, content compared after each."""
    num_blocks = num_bytes // LAYOUT.block_bytes
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_prefill_worker, args=(theirs, num_blocks, options))
    child.start()
    expected = BytesKVStore(LAYOUT, num_blocks)
    _fill(expected)
    kv, handoff = _make("d", num_blocks, options)
    wake = threading.Event()
    handoff.wake_on_event(wake)
    port = ours.recv()
    assert port is not None
    seconds = []
    for number in range(rounds + 1):
        kv.data[:] = 0
        seconds.append(
            fetch(handoff, wake, f"r{number}", port, range(num_blocks), LAYOUT.page_size)
        )
        if not np.array_equal(kv.data, expected.data):
            raise RuntimeError(f"{name}: the KV came out changed")
    ours.send(None)
    handoff.close()
    child.join()
    # The first round dials, shakes hands and faults pages in.
    return _rate(name, num_blocks * LAYOUT.block_bytes, seconds[1:])


def measure_copy(num_bytes: int, rounds: int) -> Rate:
    """One thread copying memory."""
    source, target = np.ones(num_bytes, np.uint8), np.empty(num_bytes, np.uint8)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - started)
    return _rate("memory copy, 1 thread", num_bytes, seconds)


def main() -> None:
    """Measure and print a table and a JSON line."""
    parser = argparse.ArgumentParser(description="Hand-off MB/s against a raw socket.")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shm-dir", default="/dev/shm")
    args = parser.parse_args()
    num_bytes, rounds, shm = args.megabytes << 20, args.rounds, args.shm_dir
    rates = [
        measure_copy(num_bytes, rounds),
        measure_raw_socket(num_bytes, rounds, 1),
        measure_raw_socket(num_bytes, rounds, 2),
        measure_handoff("tcp, checksum", num_bytes, rounds, transfer="tcp"),
        measure_handoff("tcp", num_bytes, rounds, transfer="tcp", checksum=False),
        measure_handoff("shm, checksum", num_bytes, rounds, transfer="shm", shm_dir=shm),
        measure_handoff("shm", num_bytes, rounds, transfer="shm", shm_dir=shm, checksum=False),
    ]
    raw = max(rate.best for rate in rates if rate.name.startswith("raw"))
    for rate in rates:
        share = 100 * rate.best / raw
        print(
            f"{rate.name:24} best {rate.best:8.0f}  median {rate.median:8.0f} MB/s {share:5.0f} %"
        )
    print(msgspec.json.encode(rates).decode())


if __name__ == "__main__":
    main()
