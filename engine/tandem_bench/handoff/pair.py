"""A hand-off between two processes, as in a fleet: P pushes its blocks whenever D asks for them."""

import itertools
import multiprocessing
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from tandem_bench.errors import CheckFailedError
from tandem_engine.handoff.events import (
    FetchDone,
    FetchFailed,
    FetchRequest,
    PrefillArrived,
    PushChunk,
)
from tandem_engine.handoff.service import HandoffService, start_handoff
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.step import KVStore
from tandem_wire.messages import PrefillPeer, SamplingParams

Side = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Rate:
    """One line of the result; rates in MB/s (1e6 bytes)."""

    name: str
    best: float
    median: float
    milliseconds: float
    """Of the middle round."""

    @classmethod
    def of(cls, name: str, num_bytes: int, seconds: Sequence[float]) -> "Rate":
        """From the seconds of every round."""
        ordered = sorted(seconds)
        median = ordered[len(ordered) // 2]
        return cls(name, num_bytes / ordered[0] / 1e6, num_bytes / median / 1e6, 1e3 * median)


class Cache(ABC):
    """One side's KV cache: the blocks that move, and whether they came out right."""

    kv: KVStore
    blocks: tuple[int, ...]

    @abstractmethod
    def clear(self) -> None:
        """Forget what has arrived."""

    @abstractmethod
    def is_right(self) -> bool:
        """Whether the blocks hold what the prefill side has sent."""


MakeCache = Callable[[Side], Cache]
"""Picklable: the prefill side's is made in its own process."""


def transports(shm_dir: str) -> dict[str, dict[str, Any]]:
    """Settings of the hand-off by the name of the case."""
    shm: dict[str, Any] = {"transport": "shm", "shm_dir": shm_dir}
    return {
        "tcp, checksum": {"transport": "tcp"},
        "tcp": {"transport": "tcp", "checksum": False},
        "shm, checksum": shm,
        "shm": shm | {"checksum": False},
    }


def _start(side: Side, cache: Cache, options: dict[str, Any]) -> HandoffService:
    settings = HandoffSettings(worker_id=side, boot_id="bench", host="127.0.0.1", **options)
    return start_handoff(settings, cache.kv, "bench")


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A variable for the processes that are started; empty: as it is."""
    before = os.environ.get(name)
    if value:
        os.environ[name] = value
    yield
    if value and before is None:
        del os.environ[name]
    elif before is not None:
        os.environ[name] = before


def _prefill_side(
    pipe: "Connection[int | None, int | None]", make: MakeCache, options: dict[str, Any]
) -> None:
    cache = make("prefill")
    handoff = _start("prefill", cache, options)
    wake = threading.Event()
    handoff.wake_on_event(wake)
    pipe.send(handoff.bootstrap_port)
    while not pipe.poll(0):
        wake.wait(0.05)
        wake.clear()
        for event in handoff.poll():
            if isinstance(event, PrefillArrived):
                tokens = len(event.request.tokens)
                push = PushChunk(event.key, 0, tokens, cache.blocks, last=True, first_token=1)
                handoff.post(push)
    handoff.close()


def _fetch(
    handoff: HandoffService,
    wake: threading.Event,
    rid: str,
    port: int,
    cache: Cache,
    transport: str,
) -> float:
    """Seconds until the worker at `port` has filled the blocks.

    Raises RuntimeError when it has not, CheckFailedError when it was over another transport.
    """
    tokens = tuple(range(len(cache.blocks) * cache.kv.layout.page_size))
    started = time.perf_counter()
    handoff.post(
        FetchRequest(
            rid=rid,
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            num_skip_tokens=0,
            blocks=cache.blocks,
            params=SamplingParams(max_tokens=1),
            peers=(PrefillPeer("prefill", "127.0.0.1", port),),
        )
    )
    while True:
        wake.wait(30)
        wake.clear()
        for event in handoff.poll():
            if isinstance(event, FetchFailed):
                raise RuntimeError(event.message)
            if isinstance(event, FetchDone):
                seconds = time.perf_counter() - started
                if event.transport != transport:
                    raise CheckFailedError(
                        f"KV went over {event.transport}, not over {transport}, which this pair "
                        "can't use: see the log"
                    )
                return seconds


Round = Callable[[], float]
"""Moves the bytes once; the seconds that it took."""


@contextmanager
def running_handoff(
    name: str, make: MakeCache, options: dict[str, Any], *, visible_gpus: str = ""
) -> Iterator[tuple[Round, int]]:
    """Two workers: what fetches all blocks from a second process, and the bytes of one fetch.

    Args:
        visible_gpus: what the second process has in CUDA_VISIBLE_DEVICES; empty: what we have.

    The fetch raises CheckFailedError when the contents came out changed. The first one dials,
    shakes hands and faults pages in.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_prefill_side, args=(theirs, make, options))
    with _environment("CUDA_VISIBLE_DEVICES", visible_gpus):
        child.start()
    cache = make("decode")
    handoff = _start("decode", cache, options)
    wake = threading.Event()
    handoff.wake_on_event(wake)
    port = ours.recv()
    assert port is not None
    numbers = itertools.count()

    def fetch() -> float:
        cache.clear()
        seconds = _fetch(handoff, wake, f"r{next(numbers)}", port, cache, options["transport"])
        if not cache.is_right():
            raise CheckFailedError(f"{name}: the KV came out changed")
        return seconds

    yield fetch, len(cache.blocks) * cache.kv.layout.block_bytes
    ours.send(None)
    handoff.close()
    child.join()


def measure_handoff(
    name: str, make: MakeCache, rounds: int, options: dict[str, Any], *, visible_gpus: str = ""
) -> Rate:
    """Fetches of all blocks from a second process, contents compared after each.

    Raises:
        CheckFailedError: they came out changed.
    """
    with running_handoff(name, make, options, visible_gpus=visible_gpus) as (fetch, num_bytes):
        seconds = [fetch() for _ in range(rounds + 1)]
    return Rate.of(name, num_bytes, seconds[1:])
