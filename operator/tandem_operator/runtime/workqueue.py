"""One level-triggered queue: a key is worked by one task at a time, however many triggers it gets.

Triggers that come while a key is being worked leave one mark, so the key is worked once more
afterwards; nothing is lost and nothing runs twice at once. A pass that raises is repeated with
exponential back-off; a pass may ask to be repeated after some seconds.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

Key = tuple[str, str]
"""(namespace, name) of an InferenceService: the one key function of the operator is `key_of`."""
Work = Callable[[Key], Awaitable[float | None]]
"""Does one pass; returns seconds after which to repeat it, or None."""

log = structlog.get_logger("tandem.workqueue")


@dataclass
class _Slot:
    wanted: bool = False
    running: bool = False
    num_errors: int = 0
    forgotten: bool = False
    timer: asyncio.TimerHandle | None = None
    due: float = field(default=float("inf"))


class WorkQueue:
    """Keys to work on, `concurrency` at a time. `work` must be idempotent."""

    def __init__(
        self,
        work: Work,
        *,
        concurrency: int = 8,
        settle_seconds: float = 0.05,
        first_backoff_seconds: float = 0.5,
        max_backoff_seconds: float = 10.0,
    ) -> None:
        self._work = work
        self._settle = settle_seconds
        self._first_backoff = first_backoff_seconds
        self._max_backoff = max_backoff_seconds
        self._slots: dict[Key, _Slot] = {}
        self._limit = asyncio.Semaphore(concurrency)
        self._open = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_keys(self) -> int:
        """Keys that are being worked on or wait."""
        return sum(1 for slot in self._slots.values() if slot.running or slot.wanted)

    def known(self) -> list[Key]:
        """Every key that is planned or worked on; a service that exists always is."""
        return list(self._slots)

    def open(self) -> None:
        """Let passes start (this replica leads)."""
        self._open.set()

    def pause(self) -> None:
        """Start no further pass; those that run continue to their end."""
        self._open.clear()

    def trigger(self, key: Key, delay: float | None = None) -> None:
        """Ask for a pass over `key`, after `delay` seconds (default: a moment, to batch events)."""
        slot = self._slots.setdefault(key, _Slot())
        slot.forgotten = False
        if slot.running and delay is None:
            slot.wanted = True
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + (self._settle if delay is None else delay)
        if slot.timer is not None:
            if slot.due <= due:
                return
            slot.timer.cancel()
        slot.due = due
        slot.timer = loop.call_at(due, self._start, key)

    def forget(self, key: Key) -> None:
        """Drop what is planned for a key that no longer exists."""
        slot = self._slots.get(key)
        if slot is None:
            return
        if slot.timer is not None:
            slot.timer.cancel()
        if not slot.running:
            del self._slots[key]
        else:
            slot.timer, slot.due, slot.wanted = None, float("inf"), False
            slot.forgotten = True  # a pass that runs goes to its end, and asks for no other

    async def close(self) -> None:
        """Cancel every pass and timer."""
        for slot in self._slots.values():
            if slot.timer is not None:
                slot.timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, key: Key) -> None:
        slot = self._slots.get(key)
        if slot is None:
            return
        slot.timer, slot.due = None, float("inf")
        if slot.running:
            slot.wanted = True
            return
        slot.running = True
        task = asyncio.get_running_loop().create_task(self._pass(key, slot), name=f"pass-{key}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass(self, key: Key, slot: _Slot) -> None:
        again: float | None = None
        try:
            async with self._limit:
                await self._open.wait()
                slot.wanted = False
                again = await self._work(key)
            slot.num_errors = 0
        except Exception as error:
            slot.num_errors += 1
            again = min(self._first_backoff * 2 ** (slot.num_errors - 1), self._max_backoff)
            log.warning("pass failed", key=key, error=repr(error), retry_seconds=again)
        finally:
            slot.running = False
        if slot.forgotten:
            again = None
        if slot.wanted:
            slot.wanted = False
            self.trigger(key)
        elif again is not None:
            self.trigger(key, again)
        elif slot.timer is None and self._slots.get(key) is slot:
            del self._slots[key]


def key_of(namespace: str | None, name: str) -> Key:
    """The key of a service, whoever triggers it."""
    return (namespace or "default", name)
