"""One pass over one service: observe, reconcile, execute."""

import time
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from tandem_operator.clients.cluster import Cluster
from tandem_operator.errors import ConflictError, MissingError, NamespaceEndsError, OperatorError
from tandem_operator.execute.executor import Executor
from tandem_operator.facts.observed import Observed
from tandem_operator.facts.worker import ProbeResult
from tandem_operator.names.objects import INFERENCE_SERVICE
from tandem_operator.observe.observer import Observer
from tandem_operator.plan import Plan, leave_policy, reconcile
from tandem_operator.runtime.metrics import Metrics
from tandem_operator.runtime.workqueue import Key

log = structlog.get_logger("tandem.controller")


class Controller:
    """What the queue calls. After a restart it misses only the last probe."""

    def __init__(
        self,
        cluster: Cluster,
        observer: Observer,
        executor: Executor,
        metrics: Metrics,
    ) -> None:
        self._cluster = cluster
        self._observer = observer
        self._executor = executor
        self._metrics = metrics
        self._probes: dict[Key, ProbeResult] = {}
        self._errors: dict[Key, OperatorError] = {}
        self._ending: dict[Key, str] = {}  # uids of services whose namespaces are being deleted

    async def work(self, key: Key) -> float | None:
        """Do one pass. Returns after how many seconds to repeat it; None: the service is gone."""
        namespace, name = key
        started = time.perf_counter()
        try:
            observed = await self._observer.observe(
                namespace, name, self._probes.get(key), self._errors.get(key)
            )
            self._errors.pop(key, None)
            if self._ending.get(key) == observed.uid:
                observed = replace(observed, namespace_ends=True)
            planning = time.perf_counter()
            plan = reconcile(observed, datetime.now(UTC))
            self._observer.remember(observed, plan.memory)
            self._metrics.plan_seconds.observe(time.perf_counter() - planning)
            self._metrics.record(observed, plan)
            probe = await self._execute(plan, observed)
        except MissingError as error:
            if await self._exists(key):
                raise
            log.info("service is gone", key=key, last=str(error))
            left = await self._observer.left_policy(namespace, name)
            targets = leave_policy(left, name) if left is not None else None
            if targets is not None:
                await self._executor.write_policy_status(targets, namespace)
            self._observer.forget(namespace, name)
            self._probes.pop(key, None)
            self._ending.pop(key, None)
            self._metrics.forget(namespace, name)
            return None
        except Exception as error:
            if isinstance(error, OperatorError) and not isinstance(error, ConflictError):
                self._errors[key] = error
            self._metrics.errors.labels(namespace, name, type(error).__name__).inc()
            raise
        self._metrics.reconcile_seconds.labels(namespace, name).observe(
            time.perf_counter() - started
        )
        if probe is not None:
            self._probes[key] = probe
            return 0.05
        if not plan.quiet:
            log.info(
                "pass",
                key=key,
                create=len(plan.create),
                drain=len(plan.mark),
                delete=len(plan.delete),
            )
        return plan.requeue_after

    async def _execute(self, plan: Plan, observed: Observed) -> ProbeResult | None:
        try:
            return await self._executor.execute(plan, observed)
        except NamespaceEndsError as error:
            # A namespace that is being deleted never returns; its services go with it.
            key = (observed.namespace, observed.name)
            self._ending[key] = observed.uid
            log.warning("nothing more is made for this service", key=key, because=error.message)
            return None

    async def _exists(self, key: Key) -> bool:
        try:
            await self._cluster.get(INFERENCE_SERVICE, key[1], key[0])
        except MissingError:
            return False
        return True
