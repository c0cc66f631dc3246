"""The place where the pages of one attempt land on the decode side, and what has landed."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from tandem_engine.handoff.pages import Pages, payload_checksum, place_seed
from tandem_engine.memory import OpenCache, Staging

_MASK = (1 << 64) - 1
_TELL_SECONDS: Final = 0.5


class Landing:
    """The destination blocks of one (request, epoch).

    Transport threads call `write`, `unstage` or `pour` (staged), `placed` or `check` (one-sided);
    the loop calls `fence`. The blocks belong to the attempt until `fence` has returned: from then
    on this side writes no byte of it, however late it comes. Counts are read on the loop.
    """

    def __init__(
        self,
        pages: Pages,
        blocks: Sequence[int],
        *,
        checksum: bool,
        on_progress: Callable[[], None],
    ) -> None:
        self.pages = pages
        self.blocks = frozenset(blocks)
        self._with_checksum = checksum
        self._on_progress = on_progress
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._num_writing = 0
        self._fenced = False
        self._quiet: asyncio.Future[None] = self._loop.create_future()
        self._told_at = time.monotonic()
        self.num_bytes = 0
        self.checksum = 0
        self.seconds = 0.0  # that threads spent on it, all together
        self.error = ""

    def write(self, blocks: Sequence[int], layers: range, payload: memoryview) -> bool:
        """Put one write's bytes into place; False when this attempt is over (nothing written)."""

        def take() -> int:
            checksum = payload_checksum(blocks, layers, payload) if self._with_checksum else 0
            self.pages.take(blocks, layers, payload)
            return checksum

        return self._put(blocks, layers, len(payload), take)

    def unstage(self, blocks: Sequence[int], layers: range, staging: Staging, at: int) -> bool:
        """Put one write's bytes from staging memory into place; False when this attempt is over."""

        def take() -> int:
            seed = place_seed(blocks, layers) if self._with_checksum else None
            return self.pages.unstage(blocks, layers, staging, at, seed)

        return self._put(blocks, layers, self._num_bytes_of(blocks, layers), take)

    def views(self, blocks: Sequence[int], layers: range) -> list[memoryview] | None:
        """Where one write's bytes go, for `pour`; None: use `write`, which says what is wrong."""
        if self._find_misplacement(blocks, layers):
            return None
        return self.pages.views(blocks, layers)

    def pour(self, receive: Callable[[], int]) -> int | None:
        """Have `receive` put some bytes of a write into its views; None when this attempt is over.

        It must soon return, come what may: `fence` waits for it.
        """
        if not self._begin():
            return None
        try:
            return receive()
        finally:
            self._pause()

    def progress(self) -> None:
        """Say that some of a write has come, if it was quiet for a while."""
        now = time.monotonic()
        if now > self._told_at + _TELL_SECONDS:
            self._told_at = now
            self._loop.call_soon_threadsafe(self._on_progress)

    def poured(self, num_bytes: int, checksum: int) -> bool:
        """Count one write that `pour` has put into place; False when this attempt is over."""
        if not self._begin():
            return False
        self._end(num_bytes, checksum, 0.0, "")
        return True

    def placed(self, blocks: Sequence[int], layers: range) -> bool:
        """Check and count what the peer has put into place; False when this attempt is over."""

        def check() -> int:
            if not self._with_checksum:
                return 0
            return payload_checksum(blocks, layers, self.pages.export(blocks, layers))

        return self._put(blocks, layers, self._num_bytes_of(blocks, layers), check)

    def check(self, blocks: Sequence[int], layers: range, cache: OpenCache) -> bool:
        """Check and count what the peer has put into `cache`; False when this attempt is over."""

        def take() -> int:
            seed = place_seed(blocks, layers) if self._with_checksum else None
            return self.pages.check(cache, blocks, layers, seed)

        return self._put(blocks, layers, self._num_bytes_of(blocks, layers), take)

    def is_settled(self) -> bool:
        """Whether no step of this worker can still write to the blocks."""
        return self.pages.are_settled(self.blocks)

    def _num_bytes_of(self, blocks: Sequence[int], layers: range) -> int:
        return len(blocks) * len(layers) * self.pages.layer_bytes

    def _put(
        self, blocks: Sequence[int], layers: range, num_bytes: int, take: Callable[[], int]
    ) -> bool:
        """Take one write by `take`, which returns its checksum; False when it came too late."""
        if not self._begin():
            return False
        error, checksum, started = "", 0, time.perf_counter()
        try:
            error = self._find_misplacement(blocks, layers)
            if not error:
                checksum = take()
        except ValueError as refused:
            error = str(refused)
        finally:
            self._end(num_bytes, checksum, time.perf_counter() - started, error)
        return True

    def _begin(self) -> bool:
        with self._lock:
            if self._fenced:
                return False
            self._num_writing += 1
        return True

    def _find_misplacement(self, blocks: Sequence[int], layers: range) -> str:
        if not self.blocks.issuperset(blocks):
            return "the peer wrote to blocks that do not belong to this request"
        if layers.start < 0 or layers.stop > self.pages.num_layers:
            return (
                f"the peer wrote to layers from {layers.start} to {layers.stop}, "
                f"of {self.pages.num_layers}"
            )
        return ""

    def _pause(self) -> None:
        with self._lock:
            self._num_writing -= 1
            last = self._fenced and self._num_writing == 0
        if last:
            self._loop.call_soon_threadsafe(self._wrote, last)

    def _end(self, num_bytes: int, checksum: int, seconds: float, error: str) -> None:
        with self._lock:
            self._num_writing -= 1
            self.num_bytes += num_bytes
            self.seconds += seconds
            self.checksum = (self.checksum + checksum) & _MASK
            self.error = self.error or error
            last = self._fenced and self._num_writing == 0
        self._loop.call_soon_threadsafe(self._wrote, last)

    def _wrote(self, last: bool) -> None:
        if last and not self._quiet.done():
            self._quiet.set_result(None)
        self._on_progress()

    async def fence(self) -> None:
        """Refuse every further write and wait for those that are being made."""
        with self._lock:
            self._fenced = True
            writing = self._num_writing > 0
        if writing:
            await asyncio.shield(self._quiet)
