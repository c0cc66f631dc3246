"""The queue of requests that hold no blocks."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from tandem_engine.scheduler.request import Request


def _sort_key(request: Request) -> tuple[int, int, int]:
    return request.sort_key


class WaitingQueue:
    """Requests by priority, then by the role's preference, then by arrival.

    A preempted request keeps its arrival and so comes back before younger ones of its class.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def head(self) -> Request | None:
        """The request to admit next."""
        return self._requests[0] if self._requests else None

    def add(self, request: Request) -> None:
        """Queue a request."""
        insort(self._requests, request, key=_sort_key)

    def remove(self, request: Request) -> None:
        """Take a request out; it must be in the queue."""
        place = bisect_left(self._requests, request.sort_key, key=_sort_key)
        assert self._requests[place] is request, "sort keys must be unique and constant"
        del self._requests[place]
