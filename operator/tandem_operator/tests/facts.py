"""Facts for tests of the pure core, and a small fleet that obeys plans."""

import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from tandem_operator.api import InferenceServiceSpec, InferenceServiceStatus
from tandem_operator.facts.admin import AdminAccess
from tandem_operator.facts.child import ChildView
from tandem_operator.facts.observed import (
    Claim,
    Images,
    Observed,
    Ownership,
    PoolView,
    RouterView,
)
from tandem_operator.facts.worker import PodFailure, ProbeResult, WorkerPod, WorkerState
from tandem_operator.names.annotations import (
    ANNOTATION_DRAINING,
    ANNOTATION_IGNORED_SCALE,
    ANNOTATION_MODEL,
    ANNOTATION_MOVING,
    ANNOTATION_SPEC_REPLICAS,
)
from tandem_operator.names.labels import LABEL_REVISION
from tandem_operator.names.objects import CONTROLLER_REVISION
from tandem_operator.observe.objects import read_record
from tandem_operator.observe.pod import read_pod
from tandem_operator.pair import Pair, Role
from tandem_operator.plan import Plan, reconcile

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
IMAGES = Images("router:1", "engine:1")
OPERATOR = "tandem-system/tandem-operator"
ADMIN = AdminAccess("qwen-admin-abc", "token")
ROLES = {"qwen-prefill": Role.PREFILL, "qwen-decode": Role.DECODE}


def make_spec(**changes: Any) -> InferenceServiceSpec:
    """A small service; `changes` are top-level fields, in camelCase."""
    base: dict[str, Any] = {
        "model": {"uri": "mock://fast"},
        "prefill": {"replicas": 1},
        "decode": {"replicas": 2},
        "rdma": {"mode": "None"},
        "kvTransfer": {"verify": {"minMegabytesPerSecond": 1}},
        "rollout": {"drainSeconds": 60},
    }
    return InferenceServiceSpec.model_validate({**base, **changes})


def make_pod(name: str = "qwen-decode-a", **changes: Any) -> WorkerPod:
    """A ready decode worker of revision r1."""
    facts: dict[str, Any] = {
        "name": name,
        "uid": f"uid-{name}",
        "role": Role.DECODE,
        "revision": "r1",
        "group": name.rsplit("-", 1)[-1],
        "created": NOW - timedelta(minutes=5),
        "ip": "10.0.0.1",
        "node": "node-1",
        "ready": True,
        "started": True,
        "served": True,
        "admin_secret": ADMIN.secret_name,
        "admin_token": ADMIN.token,
    }
    return WorkerPod(**{**facts, **changes})


def make_observed(spec: InferenceServiceSpec | None = None, **changes: Any) -> Observed:
    """A service at its first visit."""
    facts: dict[str, Any] = {
        "name": "qwen",
        "namespace": "default",
        "uid": "uid-qwen",
        "generation": 1,
        "spec": make_spec() if spec is None else spec,
        "images": IMAGES,
        "admin": ADMIN,
        "nodes": (),
        "ownership": Ownership(Claim.MINE, OPERATOR, OPERATOR),
    }
    return Observed(**{**facts, **changes})


@dataclass
class Fleet:
    """Obeys plans like an API server with a kubelet would, without time of its own."""

    spec: InferenceServiceSpec
    now: datetime = NOW
    generation: int = 1
    status: InferenceServiceStatus = field(default_factory=InferenceServiceStatus)
    pools: Pair[PoolView | None] = Pair(None, None)
    pods: dict[str, WorkerPod] = field(default_factory=dict)
    router: RouterView | None = None
    probe: ProbeResult | None = None
    busy: dict[str, int] = field(default_factory=dict)  # streams by pod
    deleting_since: datetime | None = None
    has_former_finalizer: bool = False
    plans: list[Plan] = field(default_factory=list)
    num_pods_made: int = 0
    records: dict[str, Pair[WorkerPod | None]] = field(default_factory=dict)  # by their names
    draining: set[str] = field(default_factory=set)  # workers that were told to
    told_roles: dict[str, str] = field(default_factory=dict)  # other ones than their pools'
    broken: set[str] = field(default_factory=set)  # revisions whose pods never start

    def observe(self) -> Observed:
        """What an observer would see."""
        pods = tuple(
            replace(
                pod,
                state=WorkerState(self.busy.get(pod.name, 0), 0, pod.name in self.draining),
                told_role=self.told_roles.get(pod.name, pod.role),
            )
            if pod.started
            else pod
            for pod in self.pods.values()
        )
        routed = self.router.revision if self.router else ""
        return make_observed(
            self.spec,
            generation=self.generation,
            status=self.status,
            pools=self.pools,
            pods=pods,
            router=self.router,
            probe=self.probe,
            deleting_since=self.deleting_since,
            has_former_finalizer=self.has_former_finalizer,
            children=tuple(
                ChildView(CONTROLLER_REVISION, name, f"uid-{name}", frozenset({"uid-qwen"}))
                for name in self.records
            ),
            recorded=self.records.get(f"qwen-{routed}", Pair(None, None)),
        )

    def step(self, seconds: float = 1.0, *, start_pods: bool = True) -> Plan:
        """One pass, then the world moves on."""
        plan = reconcile(self.observe(), self.now)
        self.plans.append(plan)
        self._obey(plan)
        if start_pods:
            self.start_pods()
        self.now += timedelta(seconds=seconds)
        return plan

    def settle(self, limit: int = 200) -> None:
        """Pass until nothing changes any more and no failed pod waits for its back-off."""
        for _ in range(limit):
            before = (self.status, self.pools, dict(self.pods), self.router)
            plan = self.step()
            after = (self.status, self.pools, dict(self.pods), self.router)
            waits = any(pod.failure is not None for pod in self.pods.values())
            if plan.quiet and before == after and not waits:
                return
        raise AssertionError("it doesn't settle")

    def start_pods(self) -> None:
        """Every pod that waits runs and is ready."""
        for name, pod in self.pods.items():
            if not pod.started and pod.failure is None and pod.revision not in self.broken:
                self.pods[name] = replace(pod, started=True, served=True, ready=True, ip="10.0.0.9")

    def crash(self, name: str, reason: str = "Error") -> None:
        """The engine of a pod ends."""
        failure = PodFailure(1, reason, self.now, "last words")
        self.pods[name] = replace(self.pods[name], started=False, ready=False, failure=failure)

    def edit(self, spec: InferenceServiceSpec) -> None:
        """The user changes the spec."""
        self.spec = spec
        self.generation += 1

    def scale(self, role: Role, replicas: int) -> None:
        """Someone writes a pool's /scale."""
        self.pools = self.pools.put(role, replace(self.pool(role), replicas=replicas))

    def pool(self, role: Role) -> PoolView:
        """The WorkerPool of a role, which must exist."""
        pool = self.pools.of(role)
        assert pool is not None
        return pool

    def count(self, role: Role) -> int:
        """Live workers of a role."""
        return sum(pod.role is role and pod.live for pod in self.pods.values())

    def _obey(self, plan: Plan) -> None:
        if plan.drop_finalizer:
            self.has_former_finalizer = False
        for child in plan.apply:
            self._apply(child)
        for removal in plan.remove:
            del self.records[removal.name]
        for body in plan.create:
            self._create(body)
        for mark in plan.mark:
            self._mark(mark.name, mark.annotations)
        for call in plan.engine_calls:
            if call.action == "probe":
                self.probe = ProbeResult(
                    call.revision, call.pod, call.peer, self.now, "tcp", 10**8, 0.1
                )
            elif call.action == "drain":
                self.draining.add(call.pod)
            elif call.action == "role":
                self.told_roles[call.pod] = call.body["role"]
            else:
                self.draining.discard(call.pod)
        for item in plan.delete:
            assert self.pods[item.name].uid == item.uid
            del self.pods[item.name]
        if plan.status is not None:
            self.status = InferenceServiceStatus.model_validate(plan.status)
        for name, status in plan.pool_status.items():
            role = ROLES[name]
            desired = status["desiredReplicas"]
            pool = replace(self.pool(role), status=status, desired=desired)
            self.pools = self.pools.put(role, pool)

    def _apply(self, child: dict[str, Any]) -> None:
        meta = child["metadata"]
        if child["kind"] == "WorkerPool":
            role = ROLES[meta["name"]]
            old = self.pools.of(role)
            pool = PoolView(
                name=meta["name"],
                uid=f"uid-{meta['name']}",
                replicas=child["spec"]["replicas"],
                spec_replicas=int(meta["annotations"][ANNOTATION_SPEC_REPLICAS]),
                desired=old.desired if old else None,
                ignored_scale=meta["annotations"].get(ANNOTATION_IGNORED_SCALE, ""),
                revision=child["spec"]["revision"],
                status=old.status if old else {},
            )
            self.pools = self.pools.put(role, pool)
        elif child["kind"] == CONTROLLER_REVISION:
            assert meta["name"] not in self.records, "a record can't be changed"
            made = {**child, "metadata": {**meta, "uid": f"uid-{meta['name']}"}}
            self.records[meta["name"]] = read_record(made, self.pools)
        elif child["kind"] == "Deployment":
            number = child["spec"].get("replicas", self.router.wanted if self.router else 1)
            revision = meta["labels"][LABEL_REVISION]
            self.router = RouterView(
                revision,
                number,
                number,
                rolled_out=True,
                wanted=number,
                model_id=meta["annotations"][ANNOTATION_MODEL],
            )

    def _create(self, body: dict[str, Any]) -> None:
        name = body["metadata"]["name"]
        assert name not in self.pods, "a name is never used twice"
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
        self.num_pods_made += 1
        stamp = self.now.isoformat().replace("+00:00", "Z")
        meta = {**body["metadata"], "uid": f"uid-{self.num_pods_made}", "creationTimestamp": stamp}
        pod = read_pod({**body, "metadata": meta})
        assert pod is not None
        assert pod.admin_secret == ADMIN.secret_name
        self.pods[name] = replace(pod, admin_token=ADMIN.token)

    def _mark(self, name: str, annotations: Any) -> None:
        pod = self.pods[name]
        if ANNOTATION_DRAINING in annotations:
            marked = annotations[ANNOTATION_DRAINING]
            since = datetime.fromisoformat(marked) if marked else None
            pod = replace(pod, draining_since=since)
        if ANNOTATION_MOVING in annotations:
            pod = replace(pod, moving=annotations[ANNOTATION_MOVING] == "true")
        self.pods[name] = pod
