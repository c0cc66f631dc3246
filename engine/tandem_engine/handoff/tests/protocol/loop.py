"""One worker's loop: callbacks in asyncio's order, run one by one, and no clock of its own."""

import asyncio
import heapq
import itertools
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")
_NUMBERS = itertools.count()


class _NumberedFuture(asyncio.Future[Any]):
    """Hashed by its number: sets of objects are in the order of their addresses otherwise."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._number = next(_NUMBERS)

    def __hash__(self) -> int:
        return self._number


class _NumberedTask(asyncio.Task[T]):
    """Hashed by its number, too."""

    def __init__(self, coro: Coroutine[Any, Any, T], **options: Any) -> None:
        self._number = next(_NUMBERS)
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number


def restart_numbers() -> None:
    """Number futures and tasks from 0 again: two runs of one world are the same then."""
    global _NUMBERS
    _NUMBERS = itertools.count()


class Clock:
    """Seconds, which pass when someone says so."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class ModelLoop(asyncio.AbstractEventLoop):
    """As much of a loop as the hand-off needs. `network` opens connections and ports.

    Ready callbacks run first in, first out, as in asyncio; so what is free is only when they run,
    seen from other workers, the core and the transports' threads.
    """

    def __init__(self, clock: Clock, network: Any) -> None:
        self.clock = clock
        self.ready: deque[asyncio.Handle] = deque()
        self.errors: list[str] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self._network = network
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._sequence = itertools.count()

    # --- driven by the model ----------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a callback is ready now."""
        self._take_timers()
        return bool(self.ready)

    @property
    def next_timer(self) -> float | None:
        """When the next timer is due."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def _take_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self.clock.now:
            handle = heapq.heappop(self._timers)[2]
            if not handle.cancelled():
                self.ready.append(handle)

    def run_one(self) -> None:
        """Run the callback that is next."""
        self._take_timers()
        if not self.ready:
            return
        handle = self.ready.popleft()
        if handle.cancelled():
            return
        events._set_running_loop(self)
        try:
            handle._run()
        finally:
            events._set_running_loop(None)

    def run_turn(self) -> None:
        """Run the callbacks that are ready now, but not those that they make ready."""
        self._take_timers()
        for _ in range(len(self.ready)):
            self.run_one()

    def open_tasks(self) -> list[asyncio.Task[Any]]:
        """The tasks that have not ended."""
        self.tasks = [task for task in self.tasks if not task.done()]
        return self.tasks

    def dispose(self) -> None:
        """End whatever is left, without a word to anyone: no one will run it."""
        events._set_running_loop(self)
        try:
            for task in self.open_tasks():
                for _ in range(100):  # it may wait for more while it ends
                    try:
                        task.get_coro().close()
                    except Exception:
                        continue
                    break
        finally:
            events._set_running_loop(None)

    # --- asyncio's side ---------------------------------------------------------------------------

    def time(self) -> float:
        return self.clock.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return events._get_running_loop() is self

    def is_closed(self) -> bool:
        return False

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self.ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.clock.now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._sequence), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        return None

    def create_future(self) -> "asyncio.Future[Any]":
        return _NumberedFuture(self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, **options: Any
    ) -> "asyncio.Task[T]":
        task = _NumberedTask(coro, loop=self, name=name, **options)
        self.tasks.append(task)
        if len(self.tasks) > 200:
            self.open_tasks()
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if "future" in context or "task" in context:
            return  # from the garbage collector: who knows when
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    async def create_connection(  # type: ignore[override]
        self, factory: Callable[[], Any], host: str, port: int
    ) -> tuple[Any, Any]:
        transport = await self._network.connect(self, host, port)
        protocol = factory()
        transport.start(protocol)
        return transport, protocol

    async def create_server(  # type: ignore[override]
        self, factory: Callable[[], Any], host: str, port: int
    ) -> Any:
        return self._network.listen(self, factory, port)


def make_loop(clock: Clock, network: Any) -> ModelLoop:
    """A loop without what the hand-off never calls."""
    return ModelLoop(clock, network)  # type: ignore[abstract]
