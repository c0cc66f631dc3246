"""The interface of a routing policy, and the loads that policies look at."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from tandem_router.workers.link import WorkerLink

DEFAULT_PREFILL_TOKENS_PER_SECOND = 4000.0


@dataclass(frozen=True)
class Placement:
    """What a policy may look at: the tokens to compute and the tenant's salt."""

    tokens: Sequence[int]
    cache_salt: str = ""


class Policy(ABC):
    """Chooses among workers that are all fit to serve; keeps no reference to a request."""

    @abstractmethod
    def choose_decode(self, candidates: Sequence[WorkerLink], placement: Placement) -> WorkerLink:
        """One of `candidates`, which is not empty."""

    def order_prefill(self, candidates: Sequence[WorkerLink]) -> list[WorkerLink]:
        """Least queued prefill seconds first."""
        return sorted(candidates, key=queued_seconds)


def queued_seconds(link: WorkerLink) -> float:
    """Predicted seconds until the worker would start on a prompt that is sent to it now."""
    state = link.state
    rate = DEFAULT_PREFILL_TOKENS_PER_SECOND
    queued = 0.0
    if state is not None:
        rate = state.prefill_tokens_per_second or rate
        queued = state.queued_prompt_seconds
    return queued + link.num_prompt_tokens_since_state / rate


def lacks_room(link: WorkerLink, placement: Placement) -> bool:
    """Whether the worker's own report says that it has too few free blocks for the prompt."""
    if link.state is None or link.welcome is None or not link.state.num_blocks:
        return False
    return link.state.num_free_blocks * link.welcome.page_size < len(placement.tokens)
