"""The interface of discovery."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from tandem_router.workers.link import WorkerAddress

OnWorkers = Callable[[Sequence[WorkerAddress]], None]


class Discovery(ABC):
    """Finds workers. A source that can't be reached never means that the workers are gone."""

    @abstractmethod
    async def run(self, on_workers: OnWorkers) -> None:
        """Call `on_workers` with the whole list now and after every change; until cancelled."""
