"""What a request's sequences hand to the one task that answers the client."""

import asyncio
from typing import Generic, TypeVar

from tandem_router.errors import RouterError
from tandem_wire.messages import StepItem

Source = TypeVar("Source")
Event = tuple[Source, StepItem | RouterError]


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class TokenStream(Generic[Source]):
    """A queue without a bound of its own: `max_tokens` bounds it.

    Items that come while the client's socket is slow pile up here and leave as one write.
    """

    __slots__ = ("_events", "_gone", "_loop", "_waiter")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: list[Event[Source]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._gone = False

    def push(self, sequence: Source, item: StepItem | RouterError) -> None:
        """Called from a connection's reader."""
        self._events.append((sequence, item))
        self._wake()

    def close(self) -> None:
        """The client has left: the reader gets `ClientGone`."""
        self._gone = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> list[Event[Source]]:
        """All events that are there, at least one. Raises ClientGone."""
        while not self._events and not self._gone:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._gone:
            raise ClientGone
        events, self._events = self._events, []
        return events
