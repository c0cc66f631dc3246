"""What the scheduler has to say to routers and to the hand-off."""

from collections import deque

from tandem_engine.frames import CoreRefused, CoreStep, RoutedItems
from tandem_engine.handoff.events import ToHandoff
from tandem_engine.scheduler.request import Finish, Request
from tandem_wire.messages import Refused, StepItem, TokenLogprobs


class Outbox:
    """Collects messages between two flushes; one `CoreStep` holds all tokens of a step."""

    def __init__(self) -> None:
        self._items: dict[int, list[StepItem]] = {}
        self._refused: list[CoreRefused] = []
        self._handoff: deque[ToHandoff] = deque()

    def tokens(
        self,
        request: Request,
        tokens: list[int],
        finish: Finish,
        logprobs: list[TokenLogprobs] | None,
    ) -> None:
        """New tokens of a routed request, with its end if it has come."""
        if request.first_token_sent:
            item = StepItem(request.key, tokens, finish, logprobs)
        else:
            request.first_token_sent = True
            fetch = request.fetch
            item = StepItem(
                request.key,
                tokens,
                finish,
                logprobs,
                request.num_cached_tokens,
                fetch.worker_id if fetch is not None else "",
                fetch.num_bytes if fetch is not None else 0,
            )
        self.item(request.router, item)

    def prompt_logprobs(self, request: Request, logprobs: list[TokenLogprobs]) -> None:
        """Logprobs of the next tokens of a routed request's prompt."""
        request.num_scored += len(logprobs)
        self.item(request.router, StepItem(request.key, [], prompt_logprobs=logprobs))

    def item(self, router: int, item: StepItem) -> None:
        """Any other news about a request."""
        items = self._items.get(router)
        if items is None:
            self._items[router] = [item]
        else:
            items.append(item)

    def refuse(self, router: int, refused: Refused) -> None:
        """A request that will not be run."""
        self._refused.append(CoreRefused(router, refused))

    def handoff(self, event: ToHandoff) -> None:
        """Something for the hand-off to do."""
        self._handoff.append(event)

    def take_step(self) -> CoreStep | None:
        """All items since the last call, or None."""
        if not self._items:
            return None
        items, self._items = self._items, {}
        return CoreStep([RoutedItems(router, list_) for router, list_ in items.items()])

    def take_refused(self) -> list[CoreRefused]:
        """All refusals since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def take_handoff(self) -> list[ToHandoff]:
        """All hand-off events since the last call, in order."""
        events = list(self._handoff)
        self._handoff.clear()
        return events
