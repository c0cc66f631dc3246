"""The operator's own metrics (prefix `tandem_operator_`)."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tandem_operator.api.conditions import ConditionStatus
from tandem_operator.facts.observed import Claim, Observed
from tandem_operator.plan import Plan

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The operator's metrics, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("namespace", "service")
        self.reconcile_seconds = Histogram(
            "tandem_operator_reconcile_seconds",
            "One pass over one service: observe, reconcile, execute.",
            labels,
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.plan_seconds = Histogram(
            "tandem_operator_plan_seconds",
            "The pure part of a pass.",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.errors = Counter(
            "tandem_operator_reconcile_errors_total",
            "Passes that failed.",
            (*labels, "error"),
            registry=self.registry,
        )
        self.replicas = Gauge(
            "tandem_operator_replicas",
            "Workers by state: desired, existing, ready.",
            (*labels, "role", "state"),
            registry=self.registry,
        )
        self.decisions = Counter(
            "tandem_operator_decisions_total",
            "Steps taken: create, delete, drain, undrain, probe.",
            (*labels, "step"),
            registry=self.registry,
        )
        self.scaling_decisions = Counter(
            "tandem_operator_scaling_decisions_total",
            "Decisions of autoscaling policies, as in status.scaling.",
            (*labels, "role", "how"),
            registry=self.registry,
        )
        self.rollout_progress = Gauge(
            "tandem_operator_rollout_progress",
            "Share of wanted workers that are of the current revision and ready.",
            labels,
            registry=self.registry,
        )
        self.pairs_out_of_use = Gauge(
            "tandem_operator_pairs_out_of_use",
            "Pairs of workers that lose or change KV, as in status.transport.outOfUse.",
            labels,
            registry=self.registry,
        )
        self.condition = Gauge(
            "tandem_operator_condition",
            "1 for a condition of a service that is True, 0 for one that is False.",
            (*labels, "type"),
            registry=self.registry,
        )
        self.watch_restarts = Counter(
            "tandem_operator_watch_restarts_total",
            "Watches that were started again.",
            registry=self.registry,
        )
        self.leading = Gauge(
            "tandem_operator_leading", "1 while this replica leads.", registry=self.registry
        )
        self.namespace_served = Gauge(
            "tandem_operator_namespace_served",
            "1 while the leader serves a namespace that it was given, else 0.",
            ("watched_namespace",),
            registry=self.registry,
        )
        self.service_served = Gauge(
            "tandem_operator_service_served",
            "1 for a service that this operator serves, 0 for one that another operator serves.",
            labels,
            registry=self.registry,
        )
        self.queued = Gauge(
            "tandem_operator_queued",
            "Services that are waiting or being worked on.",
            registry=self.registry,
        )

    def record(self, observed: Observed, plan: Plan) -> None:
        """Record what a pass saw and decided."""
        labels = (observed.namespace, observed.name)
        self.service_served.labels(*labels).set(observed.ownership.claim is Claim.MINE)
        if observed.ownership.claim is not Claim.MINE:
            return
        steps = {"create": len(plan.create), "delete": len(plan.delete)}
        for call in plan.engine_calls:
            steps[call.action] = steps.get(call.action, 0) + 1
        for step, number in steps.items():
            if number:
                self.decisions.labels(*labels, step).inc(number)
        for item in plan.scaling:
            self.scaling_decisions.labels(*labels, str(item.pool), str(item.how).lower()).inc()
        transport = (plan.status or {}).get("transport", {})
        self.pairs_out_of_use.labels(*labels).set(len(transport.get("outOfUse", ())))
        for condition in (plan.status or {}).get("conditions", ()):
            each = {
                "namespace": observed.namespace,
                "service": observed.name,
                "type": condition["type"],
            }
            if condition["status"] == ConditionStatus.UNKNOWN:
                self.condition.remove_by_labels(each)
            else:
                self.condition.labels(**each).set(condition["status"] == ConditionStatus.TRUE)
        wanted = ready = 0
        for pool in (plan.status or {}).get("pools", []):
            role = pool["role"].lower()
            states = {
                "desired": pool["desired"],
                "existing": pool["replicas"],
                "ready": pool["ready"],
            }
            for state, number in states.items():
                self.replicas.labels(*labels, role, state).set(number)
            wanted += pool["desired"]
            ready += min(pool["updated"], pool["ready"], pool["desired"])
        self.rollout_progress.labels(*labels).set(ready / wanted if wanted else 1.0)

    def forget(self, namespace: str, name: str) -> None:
        """Drop the gauges of a service that is gone."""
        for gauge in (
            self.rollout_progress, self.service_served, self.pairs_out_of_use, self.replicas,
            self.condition,
        ):  # fmt: skip
            gauge.remove_by_labels({"namespace": namespace, "service": name})
