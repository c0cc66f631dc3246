"""Preemption: who gives up blocks when others need them more."""

from tandem_engine import metrics
from tandem_engine.metrics import Meter
from tandem_engine.scheduler.blocks import RequestBlocks
from tandem_engine.scheduler.limits import Limits
from tandem_engine.scheduler.queues import Running, WaitingQueue
from tandem_engine.scheduler.request import Request, State


class Preemption:
    """Takes blocks from running requests and puts those requests back into the queue.

    A preempted request keeps its tokens. It computes them again once there is room for it, from
    whatever the prefix cache still holds of them.
    """

    def __init__(
        self,
        limits: Limits,
        running: Running,
        waiting: WaitingQueue,
        blocks: RequestBlocks,
        meter: Meter,
    ) -> None:
        self._limits = limits
        self._running = running
        self._waiting = waiting
        self._blocks = blocks
        self._meter = meter

    def grow_decodes(self) -> None:
        """Give every decode the blocks that its next tokens need; preempt when none is left."""
        page, ahead = self._limits.page_size, self._limits.step_tokens - 1
        decodes = self._running.decoding
        growing = [r for r in decodes if len(r.blocks) * page <= r.num_computed + ahead]
        growing.sort(key=_preemption_order)
        for request in growing:
            # A sequence ends before the KV of its last token would be needed.
            end = min(request.num_computed + ahead + 1, request.end_length - 1)
            while request.state is State.DECODE and len(request.blocks) * page < end:
                if not self._blocks.grow(request):
                    self.preempt(max(self._running.preemptible(), key=_preemption_order))

    def preempt_below(self, priority: int) -> bool:
        """Preempt one request of a lower priority; False when there is none."""
        lower = [r for r in self._running.preemptible() if r.priority < priority]
        if not lower:
            return False
        self.preempt(max(lower, key=_preemption_order))
        return True

    def preempt(self, request: Request) -> None:
        """Take the blocks of a running request away, and queue it again."""
        self._running.remove(request)
        self._blocks.release(request)
        request.state = State.WAITING
        request.num_preemptions += 1
        self._meter.count(metrics.PREEMPTIONS)
        self._waiting.add(request)


def _preemption_order(request: Request) -> tuple[int, int]:
    """The largest goes first: lowest priority, then latest arrival."""
    return (-request.priority, request.arrival)
