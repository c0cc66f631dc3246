"""One router: its parts put together, started, and drained."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from typing import Final

import structlog

from tandem_router.api.context import RouterContext
from tandem_router.api.keys import ApiKeys
from tandem_router.config import PolicyName, RouterConfig
from tandem_router.discovery.source import Discovery, StaticDiscovery
from tandem_router.dispatch.dispatcher import Dispatcher
from tandem_router.metrics import RouterMetrics
from tandem_router.policy.base import Policy
from tandem_router.policy.kv_aware import KvAware
from tandem_router.policy.load import LeastLoaded, RoundRobin
from tandem_router.text.model import TextModel
from tandem_router.workers.fleet import Fleet

POLICIES: Final[dict[PolicyName, type[Policy]]] = {
    "KvAware": KvAware,
    "LeastLoaded": LeastLoaded,
    "RoundRobin": RoundRobin,
}
"""By the names that the API gives them."""

log = structlog.get_logger(__name__)


def build_discovery(config: RouterConfig) -> Discovery:
    """Watch pods when a service is named, else the static list."""
    if config.service:
        # Imported here: the Kubernetes client takes a second to load and a static list needs none.
        from tandem_router.discovery.pods import PodDiscovery

        return PodDiscovery(
            config.service,
            config.namespace,
            revision=config.revision,
            model_id=config.model_id,
        )
    return StaticDiscovery(config.workers)


def default_router_id() -> str:
    """The pod's name, else host and process."""
    return os.environ.get("POD_NAME") or f"{socket.gethostname()}-{os.getpid()}"


@contextlib.asynccontextmanager
async def running_router(
    config: RouterConfig, text: TextModel, discovery: Discovery | None = None
) -> AsyncIterator[RouterContext]:
    """Start fleet, dispatcher and discovery; close every connection at the end."""
    metrics = RouterMetrics(config)
    keys = ApiKeys(config.api_keys_file)
    fleet = Fleet(config)
    dispatcher = Dispatcher(config, fleet, POLICIES[config.policy](), metrics)
    source = discovery if discovery is not None else build_discovery(config)
    tasks = [
        asyncio.create_task(dispatcher.run(), name="dispatcher"),
        asyncio.create_task(source.run(fleet.update), name="discovery"),
    ]
    if keys.required:
        tasks.append(asyncio.create_task(keys.follow(), name="API keys"))
    for task in tasks:
        task.add_done_callback(_report)
    try:
        yield RouterContext(config, text, fleet, dispatcher, metrics, keys)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await fleet.close()


def _report(task: "asyncio.Task[None]") -> None:
    """Log an error when one of these tasks ends: none of them should."""
    if not task.cancelled() and task.exception() is not None:
        log.error("a part of the router died", part=task.get_name(), exc_info=task.exception())
