"""The process of every rank but the first: `python -m tandem_engine.load.member FD...`."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Final

import msgspec
import numpy as np

from tandem_engine.frames import pack_frame, read_frame
from tandem_engine.load.rank import load_rank
from tandem_engine.parallel.messages import (
    PageReply,
    PageRequest,
    RankReady,
    RankStart,
    RankStep,
    ToRank,
)
from tandem_engine.parallel.shared_file import SharedFile
from tandem_engine.parallel.step_codec import StepDecoder
from tandem_engine.startup import Startup
from tandem_engine.step import PendingStep, Runner

ORPHAN_SECONDS: Final = 3.0
"""How long a rank may take to end by itself when the first rank is gone."""
_KEPT_STEPS: Final = 8
"""Most steps that may be running at the same time."""

log = logging.getLogger(__name__)


class Steps:
    """The steps that this rank has launched, for the threads that move pages. They count from 1."""

    def __init__(self) -> None:
        self._pending: deque[PendingStep] = deque(maxlen=_KEPT_STEPS)
        self._number = 0
        self._changed = threading.Condition()

    def add(self, step: PendingStep) -> None:
        """Note that the next step was launched."""
        with self._changed:
            self._number += 1
            self._pending.append(step)
            self._changed.notify_all()

    def wait_launched(self, number: int) -> PendingStep | None:
        """Wait until step `number` is launched, and return it; None if it ended long ago."""
        with self._changed:
            self._changed.wait_for(lambda: self._number >= number)
            behind = self._number - number
            return None if behind >= len(self._pending) else self._pending[-1 - behind]

    def wait_finished(self, number: int) -> None:
        """Wait until step `number` has run."""
        if number and (step := self.wait_launched(number)) is not None:
            step.wait()


class PageServer:
    """Moves the pages of this rank's heads between its cache and the shared files."""

    def __init__(self, runner: Runner, steps: Steps) -> None:
        self._kv = runner.kv
        self._steps = steps

    def move(self, request: PageRequest, file: SharedFile, *, exporting: bool) -> PageReply:
        """Carry out a request. An error is in the reply."""
        layers = range(request.first_layer, request.first_layer + request.num_layers)
        try:
            part = file.first(request.at + request.num_bytes)[request.at :]
            self._steps.wait_finished(request.step)
            if exporting:
                part[:] = np.frombuffer(self._kv.export_blocks(request.blocks, layers), np.uint8)
            else:
                self._kv.settle(request.blocks)
                self._kv.import_blocks(request.blocks, layers, part.data)
        except Exception as error:  # reported to the first rank, whose hand-off handles it
            log.exception("failed to move pages")
            return PageReply(f"{type(error).__name__}: {error}")
        return PageReply()


def serve_pages(
    connection: socket.socket, file: SharedFile, server: Future[PageServer], exporting: bool
) -> None:
    """Answer requests until the first rank is gone, then see to it that this process ends."""
    while (payload := read_frame(connection)) is not None:
        request = msgspec.msgpack.decode(payload, type=PageRequest)
        reply = server.result().move(request, file, exporting=exporting)
        connection.sendall(pack_frame(msgspec.msgpack.encode(reply)))
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)  # a step waits for a rank that is gone


def run_steps(connection: socket.socket, runner: Runner, steps: Steps) -> bool:
    """Launch every step that the first rank sends, until a stop (True) or its end (False)."""
    decoder = msgspec.msgpack.Decoder(ToRank)
    batches = StepDecoder()
    while (payload := read_frame(connection)) is not None:
        message = decoder.decode(payload)
        if not isinstance(message, RankStep):
            return True
        steps.add(runner.launch(batches.decode(message)))
    return False


def run_rank(numbers: Sequence[int]) -> None:
    """Load, run steps, end. `numbers`: file descriptors of three connections, then of the files."""
    connection, exports, imports = (socket.socket(fileno=number) for number in numbers[:3])
    files = [SharedFile(number) for number in numbers[3:]]
    server: Future[PageServer] = Future()
    for link, file, exporting in ((exports, files[0], True), (imports, files[1], False)):
        args = (link, file, server, exporting)
        threading.Thread(target=serve_pages, args=args, name="pages", daemon=True).start()
    payload = read_frame(connection)
    if payload is None:
        return
    start = msgspec.msgpack.decode(payload, type=RankStart)
    runner = load_rank(start, Startup())
    steps = Steps()
    server.set_result(PageServer(runner, steps))
    connection.sendall(pack_frame(msgspec.msgpack.encode(RankReady(runner.num_blocks))))
    if not run_steps(connection, runner, steps):
        os._exit(1)  # whatever still runs waits for the first rank
    runner.close()


def main() -> None:
    """Entry point of a rank."""
    # The first rank decides when this process ends. A signal to the process group is for it alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        run_rank([int(argument) for argument in sys.argv[1:]])
    except Exception:
        log.exception("this rank can't go on")
        # Libraries may wait at exit for ranks that in turn wait for this one.
        logging.shutdown()
        os._exit(1)


if __name__ == "__main__":
    main()
