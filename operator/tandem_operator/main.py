"""`tandem-operator`: lead or stand by, watch, work."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from tandem_operator.clients.admin_key import AdminKey
from tandem_operator.clients.children import Children
from tandem_operator.clients.cluster import Cluster
from tandem_operator.clients.workers import WorkerClient
from tandem_operator.config import Config, read_config
from tandem_operator.controller import Controller
from tandem_operator.errors import LeadershipLost, UnreachableError
from tandem_operator.execute.events import Events
from tandem_operator.execute.executor import Executor
from tandem_operator.facts.observed import Images
from tandem_operator.names.objects import admin_key_name
from tandem_operator.observe.claims import ClaimReader
from tandem_operator.observe.observer import Observer
from tandem_operator.runtime.health import HealthServer
from tandem_operator.runtime.leader import Leader
from tandem_operator.runtime.metrics import Metrics
from tandem_operator.runtime.serving import Serving
from tandem_operator.runtime.watch import build_registry, build_settings, watch
from tandem_operator.runtime.workqueue import WorkQueue

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
    workers, metrics = WorkerClient(), Metrics()
    children = Children()
    executor = Executor(cluster, workers, Events(cluster, config.identity), children)
    claims = ClaimReader(cluster, config.operator, everywhere=not config.namespaces)
    key = AdminKey(cluster, config.own_namespace, admin_key_name(config.lease_name))
    observer = Observer(cluster, workers, _images(config), claims, children, key)
    controller = Controller(cluster, observer, executor, metrics)
    queue = WorkQueue(controller.work, concurrency=config.concurrency)
    metrics.queued.set_function(lambda: queue.num_keys)
    listen, stop = _stop_on_signals()
    settings = build_settings(metrics.watch_restarts.inc)
    registry = build_registry(queue, children)
    serving = Serving(
        cluster,
        queue,
        children,
        metrics,
        lambda namespace: watch(registry, settings, config.identity, namespace, listen),
        config.namespaces,
        config.resync_seconds,
    )
    ports = (config.health_port, config.metrics_port)
    health = HealthServer(metrics.registry, *ports, serving.problems)

    def on_change(leading: bool) -> None:
        metrics.leading.set(leading)
        queue.open() if leading else queue.pause()

    leader = Leader(cluster, config.own_namespace, config.lease_name, config.identity, on_change)
    await health.start()
    listen()
    try:
        return await _lead(config, queue, leader, stop, serving)
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
    config: Config, queue: WorkQueue, leader: Leader, stop: asyncio.Event, serving: Serving
) -> int:
    if config.leader_election:
        if not await _unless_stopped(leader.acquire(), stop):
            return 0
    else:
        queue.open()
    tasks = [asyncio.create_task(serving.run()), asyncio.create_task(stop.wait())]
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


def _stop_on_signals() -> tuple[Callable[[], None], asyncio.Event]:
    """(takes the signals, which may be called again; what is set by a signal)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(RuntimeError):  # not in the main thread: the caller stops us
                loop.add_signal_handler(number, stop.set)

    return listen, stop


if __name__ == "__main__":
    main()
