"""Every worker in turn."""

from collections.abc import Sequence

from tandem_router.policy.base import Placement, Policy
from tandem_router.workers.link import WorkerLink


class RoundRobin(Policy):
    """Decode and prefill workers in turn, by name, whatever their load."""

    def __init__(self) -> None:
        self._num_decodes = 0
        self._num_prefills = 0

    def choose_decode(self, candidates: Sequence[WorkerLink], placement: Placement) -> WorkerLink:
        ordered = sorted(candidates, key=lambda link: link.address.name)
        self._num_decodes += 1
        return ordered[(self._num_decodes - 1) % len(ordered)]

    def order_prefill(self, candidates: Sequence[WorkerLink]) -> list[WorkerLink]:
        ordered = sorted(candidates, key=lambda link: link.address.name)
        if not ordered:
            return []
        start = self._num_prefills % len(ordered)
        self._num_prefills += 1
        return ordered[start:] + ordered[:start]
