"""Where workers come from: the interface, and the list named on the command line."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from tandem_router.workers.link import WorkerAddress

OnWorkers = Callable[[Sequence[WorkerAddress]], None]


class Discovery(ABC):
    """Finds workers. A source that can't be reached never means that the workers are gone."""

    @abstractmethod
    async def run(self, on_workers: OnWorkers) -> None:
        """Call `on_workers` with the whole list now and after every change; until cancelled."""


def parse_address(text: str) -> WorkerAddress:
    """HOST:PORT, with an IPv6 host in brackets. Raises ValueError, naming --worker."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"--worker {text!r} is not HOST:PORT: write it like 10.0.0.7:8101")
    return WorkerAddress(name=text, host=host.strip("[]"), port=int(port))


class StaticDiscovery(Discovery):
    """The workers named on the command line; their links find out whether they are alive."""

    def __init__(self, workers: Sequence[str]) -> None:
        self._addresses = [parse_address(worker) for worker in workers]

    async def run(self, on_workers: OnWorkers) -> None:
        on_workers(self._addresses)
        await asyncio.Event().wait()
