"""Looks at what moves KV to decode workers, and at every worker's role, by asking now and then."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from tandem_operator.clients.workers import WorkerClient
from tandem_operator.facts.worker import Links, WorkerPod
from tandem_operator.pair import Role

LOOK_SECONDS: Final = 15.0
"""How old the last look at a worker may become."""
MAX_LOOKS: Final = 32
"""Workers that one pass asks; the others of a large fleet have their turn in the next ones."""
PATIENCE_SECONDS: Final = 1.0


@dataclass(frozen=True)
class _Look:
    at: float
    links: Links | None
    role: str = ""


class LinkObserver:
    """Remembers the last look at each worker, by service and pod."""

    def __init__(self, workers: WorkerClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._workers = workers
        self._clock = clock
        self._looks: dict[str, dict[str, _Look]] = {}

    async def add(
        self, service: str, pods: tuple[WorkerPod, ...], *, links: bool = True
    ) -> tuple[WorkerPod, ...]:
        """The pods of a service, by its uid, with the last look at those that are ready.

        Only decode workers receive KV, so only they have links; without `links` none has.
        """
        old = self._looks.get(service, {})
        ready = [pod for pod in pods if pod.ready and pod.ip]
        looks = {pod.uid: old[pod.uid] for pod in ready if pod.uid in old}
        now = self._clock()
        due = [
            pod
            for pod in ready
            if pod.uid not in looks
            or now - looks[pod.uid].at >= LOOK_SECONDS
            or looks[pod.uid].role not in ("", pod.role)
        ]
        due.sort(key=lambda pod: looks[pod.uid].at if pod.uid in looks else float("-inf"))

        async def look(pod: WorkerPod) -> None:
            state = await self._workers.state(pod.ip, pod.ports.http, PATIENCE_SECONDS)
            receives = links and pod.role is Role.DECODE
            looks[pod.uid] = (
                _Look(now, None)
                if state is None
                else _Look(now, state.links if receives else None, state.role)
            )

        await asyncio.gather(*(look(pod) for pod in due[:MAX_LOOKS]))
        self._looks[service] = looks
        return tuple(
            replace(pod, links=looks[pod.uid].links, told_role=looks[pod.uid].role)
            if pod.uid in looks
            else pod
            for pod in pods
        )

    def forget(self, service: str) -> None:
        """Forget a service that is gone."""
        self._looks.pop(service, None)
