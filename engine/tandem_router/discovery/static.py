"""A fixed list of workers."""

import asyncio
from collections.abc import Sequence

from tandem_router.discovery.base import Discovery, OnWorkers
from tandem_router.workers.link import WorkerAddress


def parse_address(text: str) -> WorkerAddress:
    """HOST:PORT, with an IPv6 host in brackets. Raises ValueError."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is no HOST:PORT")
    return WorkerAddress(name=text, host=host.strip("[]"), port=int(port))


class StaticDiscovery(Discovery):
    """The workers named on the command line; whether they live is the links' business."""

    def __init__(self, workers: Sequence[str]) -> None:
        self._addresses = [parse_address(worker) for worker in workers]

    async def run(self, on_workers: OnWorkers) -> None:
        on_workers(self._addresses)
        await asyncio.Event().wait()
