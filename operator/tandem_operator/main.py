"""`tandem-operator`: lead or stand by, watch, work."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import kopf
import structlog

from tandem_operator.clients.admin_key import AdminKey
from tandem_operator.clients.cluster import Cluster
from tandem_operator.clients.workers import WorkerClient
from tandem_operator.config import Config, read_config
from tandem_operator.controller import Controller, resync
from tandem_operator.errors import ClusterError, LeadershipLost, UnreachableError
from tandem_operator.execute.events import Events
from tandem_operator.execute.executor import Executor
from tandem_operator.facts.observed import Images
from tandem_operator.names.objects import (
    AUTOSCALING_POLICY,
    INFERENCE_SERVICE,
    WORKER_POOL,
    admin_key_name,
)
from tandem_operator.observe.observer import Observer
from tandem_operator.runtime.health import HealthServer
from tandem_operator.runtime.leader import Leader
from tandem_operator.runtime.metrics import Metrics
from tandem_operator.runtime.watch import build_registry, build_settings
from tandem_operator.runtime.workqueue import WorkQueue

KIND_SECONDS = 1.0
"""Pause between two checks whether the API server serves a kind."""

log = structlog.get_logger("tandem.main")


def main(argv: list[str] | None = None) -> None:
    """The entry point. Exits with 1 when the lease is lost: the pod then restarts as a standby."""
    config = read_config(sys.argv[1:] if argv is None else argv)
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    logging.basicConfig(level=max(level, logging.WARNING), format="%(message)s")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    if config.kubeconfig:
        os.environ["KUBECONFIG"] = config.kubeconfig
    try:
        code = asyncio.run(run(config))
    except UnreachableError as error:
        sys.exit(f"tandem-operator: {error}")
    sys.exit(code)


async def run(config: Config) -> int:
    """Run everything until a signal or the loss of the lease. Returns the exit code.

    Raises UnreachableError when nothing says which cluster to work in.
    """
    cluster = await Cluster.connect(config.kubeconfig or None)
    workers, metrics = WorkerClient(config.worker_port), Metrics()
    executor = Executor(cluster, workers, Events(cluster, config.identity))
    key = AdminKey(cluster, config.own_namespace, admin_key_name(config.lease_name))
    observer = Observer(cluster, workers, _images(config), key)
    controller = Controller(cluster, observer, executor, metrics)
    queue = WorkQueue(controller.work, concurrency=config.concurrency)
    metrics.queued.set_function(lambda: queue.num_keys)
    health = HealthServer(metrics.registry, config.health_port, config.metrics_port)

    def on_change(leading: bool) -> None:
        metrics.leading.set(leading)
        queue.open() if leading else queue.pause()

    leader = Leader(cluster, config.own_namespace, config.lease_name, config.identity, on_change)
    await health.start()
    stop = _stop_on_signals()
    try:
        settings = build_settings(metrics.watch_restarts.inc)
        registry = build_registry(queue, executor.forget)
        watch = partial(_watch, config, registry, settings)
        return await _lead(config, cluster, queue, leader, stop, watch)
    finally:
        await queue.close()
        await leader.release()
        await health.stop()
        await workers.close()
        await cluster.close()


def _images(config: Config) -> Images:
    return Images(
        config.router_image,
        config.engine_image,
        config.router_pull_policy,
        config.engine_pull_policy,
    )


async def _lead(
    config: Config,
    cluster: Cluster,
    queue: WorkQueue,
    leader: Leader,
    stop: asyncio.Event,
    watch: Callable[[], Coroutine[Any, Any, None]],
) -> int:
    if config.leader_election:
        if not await _unless_stopped(leader.acquire(), stop):
            return 0
    else:
        queue.open()
    if not await _unless_stopped(_kinds_served(config, cluster), stop):
        return 0
    tasks = [
        asyncio.create_task(watch()),
        asyncio.create_task(_resync(config, cluster, queue)),
        asyncio.create_task(stop.wait()),
    ]
    if config.leader_election:
        tasks.append(asyncio.create_task(leader.keep()))
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    failures = [error for task in done if (error := task.exception()) is not None]
    for error in failures:
        lost = isinstance(error, LeadershipLost)
        log.error("leadership lost" if lost else "the operator failed", error=repr(error))
    return 1 if failures else 0


async def _watch(
    config: Config, registry: kopf.OperatorRegistry, settings: kopf.OperatorSettings
) -> None:
    scope: dict[str, Any] = (
        {"namespaces": config.namespaces} if config.namespaces else {"clusterwide": True}
    )
    # kopf would look the user up by its number, and a container's user has no name.
    scope["identity"] = config.identity
    await kopf.operator(registry=registry, settings=settings, standalone=True, **scope)


async def _kinds_served(config: Config, cluster: Cluster) -> None:
    """Return when the API server serves the operator's kinds, which kopf looks for only once."""
    for kind in (INFERENCE_SERVICE, WORKER_POOL, AUTOSCALING_POLICY):
        while True:
            try:
                for namespace in config.namespaces or (None,):
                    await cluster.list(kind, namespace)
                break
            except ClusterError as error:
                log.warning("kind is not served yet", kind=kind, error=str(error))
                await asyncio.sleep(KIND_SECONDS)


async def _resync(config: Config, cluster: Cluster, queue: WorkQueue) -> None:
    while True:
        try:
            await resync(cluster, queue, config.namespaces)
        except ClusterError as error:
            log.warning("resync failed", error=str(error))
        await asyncio.sleep(config.resync_seconds)


async def _unless_stopped(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    tasks = {asyncio.create_task(work), asyncio.create_task(stop.wait())}
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return not stop.is_set()


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(RuntimeError):  # not in the main thread: the caller stops us
            loop.add_signal_handler(number, stop.set)
    return stop


if __name__ == "__main__":
    main()
