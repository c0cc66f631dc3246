"""The other ranks of a worker: started, watched and ended by the first one."""

import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from tandem_engine.config import WorkerConfig
from tandem_engine.errors import RankDiedError
from tandem_engine.frames import pack_frame
from tandem_engine.parallel.messages import RankStart, RankStep, RankStop
from tandem_engine.parallel.rank_process import RankProcess
from tandem_engine.parallel.shared_file import SharedFile

Fail = Callable[[str], None]
"""Called from any thread, with the reason, when a worker can't go on and no call can report it."""

_GRACE_SECONDS: Final = 1.0
"""Seconds after a rank's death in which a step may still fail and report it."""
_NOTICE_SECONDS: Final = 3.0
"""Seconds that a failed step waits to learn whether a rank's death is the cause."""
_END_SECONDS: Final = 5.0
"""Seconds that ranks may take to end when told to."""

log = logging.getLogger(__name__)


def end_process(message: str) -> None:
    """Log the reason and end the process: the default `Fail`. A hanging GPU call ends no other way.

    Never returns.
    """
    log.error("%s", message)
    os._exit(1)


class RankGroup:
    """Processes of ranks 1 and up. A rank that ends unasked ends the worker, within seconds.

    Args:
        module: what their processes run.
        fail: called when a rank died while no call could report it; None: this process ends.

    Raises:
        RankDiedError: from any call after that.
    """

    def __init__(self, config: WorkerConfig, module: str, fail: Fail | None = None) -> None:
        self._fail = fail or end_process
        self._failure = ""
        self._failed = threading.Event()
        self._stopping = threading.Event()
        self._closing = threading.Event()
        self._encoder = msgspec.msgpack.Encoder()
        self._directory = tempfile.TemporaryDirectory(prefix="tandem-ranks-")
        self.store = str(Path(self._directory.name) / "store")
        self.exports, self.imports = SharedFile(), SharedFile()
        shared = [self.exports.descriptor, self.imports.descriptor]
        self.ranks: list[RankProcess] = []
        try:
            for rank in range(1, config.tensor_parallel):
                start = RankStart(config, rank, self.store)
                self.ranks.append(RankProcess(module, start, shared, self._on_death))
        except BaseException:
            self.close(grace_seconds=0.0)
            raise

    def wait_ready(self, num_blocks: int) -> None:
        """Wait until all ranks are loaded. Each must have `num_blocks` blocks."""
        for rank in self.ranks:
            found = rank.wait_ready().num_blocks
            assert found == num_blocks, "ranks agree about their caches"

    @property
    def is_broken(self) -> bool:
        """Whether a rank is gone. Whatever waits for it would wait forever."""
        return not all(rank.is_alive for rank in self.ranks)

    def send(self, step: RankStep) -> None:
        """Have every rank launch a step."""
        self.check()
        frame = pack_frame(self._encoder.encode(step))
        for rank in self.ranks:
            rank.send(frame)

    def check(self) -> None:
        """Raise RankDiedError if a rank is gone."""
        if self._failure:
            raise RankDiedError(self._failure)

    def cause_of(self, error: Exception) -> Exception:
        """The error to raise in place of `error`, which the death of a rank may have caused."""
        if isinstance(error, RuntimeError | RankDiedError) and self._failed.wait(_NOTICE_SECONDS):
            return RankDiedError(self._failure)
        return error

    def stop(self) -> None:
        """Tell the ranks to end. An end is expected from now on; a failure is still reported."""
        self._stopping.set()
        frame = pack_frame(msgspec.msgpack.encode(RankStop()))
        for rank in self.ranks:
            try:
                rank.send(frame)
            except RankDiedError as error:
                log.debug("%s", error)  # it has ended already

    def close(self, *, grace_seconds: float = _END_SECONDS) -> None:
        """Wait until the ranks have ended, after `stop` or after a failure."""
        self._closing.set()
        for rank in self.ranks:
            rank.close(grace_seconds)
        self.exports.close()
        self.imports.close()
        self._directory.cleanup()

    def _on_death(self, account: str, code: int) -> None:
        if self._closing.is_set() or (self._stopping.is_set() and code == 0):
            return
        self._failure = account
        self._failed.set()
        # A step that fails ends the worker in an orderly way; a step that hangs can't.
        if not self._closing.wait(_GRACE_SECONDS):
            self._fail(account)
