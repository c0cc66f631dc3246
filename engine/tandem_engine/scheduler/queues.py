"""Where requests are: the table of all that are open, the queue, and those that run."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator

from tandem_engine.scheduler.request import Kind, Request, State


def _sort_key(request: Request) -> tuple[int, int, float, int]:
    return request.sort_key


class OpenRequests:
    """Every request that has not ended, by kind and key, and the deadlines of those that have one.

    `overdue` gives each request once, even one that has ended since: `holds` tells.
    """

    def __init__(self) -> None:
        self._tables: dict[Kind, dict[str, Request]] = {kind: {} for kind in Kind}
        self._deadlines: list[tuple[float, int, Request]] = []

    def __iter__(self) -> Iterator[Request]:
        for table in self._tables.values():
            yield from table.values()

    def find(self, kind: Kind, key: str) -> Request | None:
        """The request with this rid or hand-off key."""
        return self._tables[kind].get(key)

    def holds(self, request: Request) -> bool:
        """Whether this very request has not ended."""
        return self._tables[request.kind].get(request.key) is request

    def add(self, request: Request) -> None:
        """Enter a request; no open one of its kind may have its key."""
        table = self._tables[request.kind]
        assert request.key not in table, "keys are unique"
        table[request.key] = request
        if request.deadline:
            heapq.heappush(self._deadlines, (request.deadline, request.arrival, request))

    def remove(self, request: Request) -> None:
        """Take out a request that ends."""
        del self._tables[request.kind][request.key]

    def overdue(self, now: float) -> Iterator[Request]:
        """Requests whose deadline has passed since the last call."""
        while self._deadlines and self._deadlines[0][0] <= now:
            yield heapq.heappop(self._deadlines)[2]


class WaitingQueue:
    """Requests without blocks, by priority, then by the role's preference, then by arrival.

    A preempted request keeps its arrival, so it comes back before younger ones of its class. One
    that is `postponed` has its place among those that arrive so much later.
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

    def postpone(self, request: Request, seconds: float) -> None:
        """Let those go first that arrive up to so many seconds after `request`."""
        self.remove(request)
        priority, preference, arrival_time, arrival = request.sort_key
        request.sort_key = (priority, preference, arrival_time + seconds, arrival)
        self.add(request)


class Running:
    """Requests that hold blocks and take part in steps.

    `prefilling` has the order of the waiting queue. `decoding` has the order in which the
    sequences take their turns when a step is too small for all of them.
    """

    def __init__(self) -> None:
        self.prefilling: list[Request] = []
        self.decoding: list[Request] = []

    def __len__(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def start_prefill(self, request: Request, now: float) -> None:
        """Enter a request with blocks: the KV of its prompt is to be computed."""
        request.state = State.PREFILL
        request.prefill_start = now
        insort(self.prefilling, request, key=_sort_key)

    def start_decode(self, request: Request) -> None:
        """Enter a request whose prompt is computed, here or elsewhere: it generates tokens."""
        if request.state is State.PREFILL:
            self.prefilling.remove(request)
        request.state = State.DECODE
        self.decoding.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out; it must be running."""
        (self.prefilling if request.state is State.PREFILL else self.decoding).remove(request)

    def drop_ended(self) -> None:
        """Take out every sequence that ended in the last step."""
        self.decoding = [r for r in self.decoding if r.state is State.DECODE]

    def take_turns(self, share: int) -> list[Request]:
        """The sequences that decode in this step, at most `share`; the others come next."""
        decodes = self.decoding
        if len(decodes) <= share:
            return decodes
        self.decoding = decodes[share:] + decodes[:share]
        return decodes[:share]

    def preemptible(self) -> list[Request]:
        """Requests whose blocks no one else works on."""
        return [*self.decoding, *(r for r in self.prefilling if r.kind is Kind.ROUTED)]
