"""All workers of the service, as this router sees them."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from tandem_router.config import RouterConfig
from tandem_router.workers.link import WorkerAddress, WorkerLink
from tandem_wire.messages import Welcome


class Fleet:
    """Keeps one link per known worker; placement is notified of every change."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._links: dict[tuple[str, str, str, int], WorkerLink] = {}
        self._tasks: dict[tuple[str, str, str, int], asyncio.Task[None]] = {}
        self._listeners: list[Callable[[], None]] = []
        self._is_listed = False
        self._is_surveyed = False

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Have `listener` called after every change that matters for placement."""
        self._listeners.append(listener)

    @property
    def links(self) -> list[WorkerLink]:
        """Every worker that is known, usable or not."""
        return list(self._links.values())

    @property
    def welcome(self) -> Welcome | None:
        """Any connected worker's facts about the model; None while no worker is connected."""
        best: Welcome | None = None
        for link in self._links.values():
            if (
                link.is_connected
                and link.welcome is not None
                and (best is None or link.welcome.max_model_len > best.max_model_len)
            ):
                best = link.welcome
        return best

    def decode_candidates(self, now: float) -> list[WorkerLink]:
        """Workers that may get a new request now."""
        return [
            link
            for link in self._links.values()
            if link.role in ("decode", "both") and link.can_take(now)
        ]

    def prefill_candidates(self, decode: WorkerLink, now: float) -> list[WorkerLink]:
        """Prefill workers whose KV the decode worker understands."""
        assert decode.welcome is not None, "a chosen decode worker has been welcomed"
        group = decode.welcome.compatibility_hash
        return [
            link
            for link in self._links.values()
            if link is not decode
            and link.role == "prefill"
            and link.welcome is not None
            and link.welcome.compatibility_hash == group
            and link.can_take(now)
        ]

    def has_decode_worker(self) -> bool:
        """True while some decode-capable worker is connected, even if it is full or failing."""
        return any(
            link.is_connected and link.role in ("decode", "both") and not link.is_draining
            for link in self._links.values()
        )

    @property
    def is_surveyed(self) -> bool:
        """Whether discovery has listed the workers and each of them was dialled once.

        The list may be empty. Once true, this stays true.
        """
        if self._is_listed and not self._is_surveyed:
            self._is_surveyed = all(link.was_dialled for link in self._links.values())
        return self._is_surveyed

    def update(self, addresses: Iterable[WorkerAddress]) -> None:
        """Take discovery's newest list: dial new workers, let go of those that left."""
        self._is_listed = True
        wanted = {
            (address.name, address.incarnation, address.host, address.port): address
            for address in addresses
        }
        for key, address in wanted.items():
            link = self._links.get(key)
            if link is None:
                self._add(key, address)
                continue
            link.leaving = False
            if link.address != address:
                link.address = address
                link.redial_now()
        for key, link in self._links.items():
            if key not in wanted:
                link.leaving = True
        self._changed()

    def _add(self, key: tuple[str, str, str, int], address: WorkerAddress) -> None:
        link = WorkerLink(
            address,
            router_id=self._config.router_id,
            model_name=self._config.model_name,
            heartbeat_seconds=self._config.heartbeat_seconds,
            on_change=self._changed,
        )
        self._links[key] = link
        self._tasks[key] = asyncio.create_task(link.run(), name=f"worker {address.name}")

    def _changed(self) -> None:
        for key in [key for key, link in self._links.items() if link.leaving and not link.running]:
            del self._links[key]
            self._tasks.pop(key).cancel()
        for listener in self._listeners:
            listener()

    async def close(self) -> None:
        """Close every connection."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        self._links.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def describe(self) -> list[dict[str, Any]]:
        """For /state: one entry per worker."""
        return [
            {
                "name": link.address.name,
                "address": f"{link.address.host}:{link.address.port}",
                "worker_id": link.worker_id,
                "connected": link.is_connected,
                "trouble": link.trouble,
                "role": link.role,
                "draining": link.is_draining,
                "circuit_open": link.breaker.is_open,
                "running": len(link.running),
                "prefix_blocks": len(link.prefixes),
                "compatibility_hash": link.welcome.compatibility_hash if link.welcome else "",
                "boot_id": link.welcome.boot_id if link.welcome else "",
                "state": link.state,
            }
            for link in self._links.values()
        ]
