"""Policies that look at loads alone, or at nothing."""

import random
from collections.abc import Sequence

from tandem_router.policy.base import Placement, Policy, lacks_room
from tandem_router.workers.link import WorkerLink


class LeastLoaded(Policy):
    """Room first, then the fewest sequences; ties are broken at random.

    Chance matters: several routers with the same view would else all pick the same worker.
    """

    def choose_decode(self, candidates: Sequence[WorkerLink], placement: Placement) -> WorkerLink:
        return min(
            candidates,
            key=lambda link: (lacks_room(link, placement), link.num_load, random.random()),
        )


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
