"""The decode worker with the fewest sequences that has room for the prompt."""

import random
from collections.abc import Sequence

from tandem_router.policy.base import Placement, Policy
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


def lacks_room(link: WorkerLink, placement: Placement) -> bool:
    """True when the worker's own report says that the prompt's pages aren't free there."""
    if link.state is None or link.welcome is None or not link.state.num_blocks:
        return False
    return link.state.num_free_blocks * link.welcome.page_size < len(placement.tokens)
