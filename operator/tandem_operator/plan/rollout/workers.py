"""The pods of one pool: creates, replaces and removes them.

Counting is level-based: the wanted number minus the live workers. A failed pod stays as evidence
until its back-off is over. Its replacement then takes over the count of failures in a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import count

from tandem_operator.facts.observed import Observed
from tandem_operator.facts.worker import WorkerPod
from tandem_operator.names.objects import stable_id, worker_pod_name
from tandem_operator.names.worker import ACTION_ROLE
from tandem_operator.pair import Role
from tandem_operator.plan.rollout.drain import (
    DrainStep,
    can_move,
    can_return,
    cancel_drain,
    choose_victim,
    continue_drain,
    is_draining,
    start_drain,
    undo_drain,
)
from tandem_operator.plan.rollout.revisions import RevisionStep
from tandem_operator.plan.steps import Deletion, EngineCall, Note, PodMark

FIRST_BACKOFF_SECONDS = 2.0
MAX_BACKOFF_SECONDS = 300.0
HEALTHY_SECONDS = 600.0
"""After a worker ran this long, its failure counts as the first one again."""


@dataclass(frozen=True)
class NewWorker:
    """A worker to create: of the spec's revision, or `like` a worker of an older one."""

    name: str
    restarts: int
    like: WorkerPod | None = None


@dataclass
class PoolSteps:
    """What to do with the pods of one pool; filled while planning."""

    create: list[NewWorker] = field(default_factory=list)
    mark: list[PodMark] = field(default_factory=list)
    calls: list[EngineCall] = field(default_factory=list)
    delete: list[Deletion] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    requeue_after: float = 30.0

    def add(self, step: DrainStep) -> None:
        """Take over one step of a drain."""
        self.mark.extend([step.mark] if step.mark else [])
        self.calls.extend([step.call] if step.call else [])
        self.delete.extend([step.delete] if step.delete else [])

    def again(self, seconds: float) -> None:
        """Look again after at most `seconds`."""
        self.requeue_after = min(self.requeue_after, max(seconds, 0.2))


@dataclass(frozen=True)
class PoolTask:
    """One pool, and what is wanted of it. `target` is the revision of the spec."""

    observed: Observed
    role: Role
    step: RevisionStep
    target: str
    drain_seconds: int
    now: datetime

    @property
    def pods(self) -> tuple[WorkerPod, ...]:
        """The pods of the role, oldest first."""
        return self.observed.pods_of(self.role)

    def of_revision(self, revision: str) -> tuple[WorkerPod, ...]:
        """The pods of one revision, oldest first."""
        return tuple(pod for pod in self.pods if pod.revision == revision)

    @property
    def failed(self) -> list[WorkerPod]:
        """The pods that ended and are kept as evidence."""
        return [pod for pod in self.pods if pod.failure is not None and not pod.deleting]

    def can_move(self, pod: WorkerPod) -> bool:
        """Whether another worker could take the streams of `pod`."""
        return can_move(pod, self.observed.pods)


def plan_pool(task: PoolTask) -> PoolSteps:
    """What to do with the pods of one pool now."""
    steps = PoolSteps()
    wanted, keep = task.step.wanted, task.step.keep
    for revision in wanted:
        _meet_wanted(task, revision, steps)
    steps.delete.extend(
        Deletion(pod.name, pod.uid)
        for pod in task.failed
        if pod.revision not in wanted and (keep is None or pod.revision not in keep)
    )
    for pod in task.pods:
        if keep is not None and pod.revision not in keep and pod.live:
            steps.add(start_drain(pod, task.now, move=task.can_move(pod)))
            steps.notes.append(
                Note("Draining", f"{pod.name}: its revision {pod.revision} is being replaced")
            )
    _continue_drains(task, steps)
    _undo_drains(task, steps)
    _undo_roles(task, steps)
    return steps


def _meet_wanted(task: PoolTask, revision: str, steps: PoolSteps) -> None:
    pods = task.of_revision(revision)
    missing = task.step.wanted[revision].of(task.role) - sum(pod.live for pod in pods)
    for pod in pods:
        if missing > 0 and can_return(pod):
            missing -= 1
            steps.add(cancel_drain(pod))
            steps.notes.append(Note("DrainCancelled", f"{pod.name} is needed again"))
    if missing < 0:
        _shrink(task, revision, -missing, steps)
    _create(task, revision, max(missing, 0), steps)


def _create(task: PoolTask, revision: str, missing: int, steps: PoolSteps) -> None:
    names, pods = _free_names(task, revision), task.of_revision(revision)
    like = None
    if missing and revision != task.target:
        # The spec has changed since: the workers of an older revision are made like each other, or
        # like the record of the revision that serves.
        recorded = task.observed.recorded.of(task.role)
        same = recorded is not None and recorded.revision == revision
        like = next(iter(pods), recorded if same else None)
        if like is None:
            return
    failed = [pod for pod in task.failed if pod.revision == revision]
    for pod in sorted(failed, key=lambda pod: pod.restarts):
        if missing <= 0:
            steps.delete.append(Deletion(pod.name, pod.uid))
            continue
        missing -= 1
        wait = _backoff_left(pod, task.now)
        if wait > 0:
            steps.again(wait)
            continue
        new = NewWorker(next(names), _restarts_after(pod), like)
        steps.create.append(new)
        steps.delete.append(Deletion(pod.name, pod.uid, replaced_by=new.name))
        said = f"{new.name} replaces {pod.name}, which failed"
        steps.notes.append(Note("Replacing", said, created=new.name))
    for _ in range(missing):
        new = NewWorker(next(names), 0, like)
        steps.create.append(new)
        steps.notes.append(Note("Created", f"created worker {new.name}", created=new.name))


def _shrink(task: PoolTask, revision: str, surplus: int, steps: PoolSteps) -> None:
    pods = task.of_revision(revision)
    live = [pod for pod in pods if pod.live]
    unstarted = sorted((p for p in live if not p.started), key=lambda p: p.created, reverse=True)
    for pod in unstarted[:surplus]:
        steps.delete.append(Deletion(pod.name, pod.uid))
        steps.notes.append(Note("Deleting", f"{pod.name} is not needed and had not started"))
    surplus -= min(surplus, len(unstarted))
    if surplus:
        steps.again(1.0)
    why = f"its revision {revision} is being replaced"
    if revision == task.target:
        # One at a time: the survivors take over its load before the next one goes.
        why = "it has the least resident work"
        surplus = min(surplus, 0 if any(is_draining(pod) for pod in pods) else 1)
    started = [pod for pod in live if pod.started]
    for _ in range(surplus):
        victim = choose_victim(tuple(started))
        started.remove(victim)
        steps.add(start_drain(victim, task.now, move=task.can_move(victim)))
        steps.notes.append(Note("Draining", f"{victim.name}: {why}"))


def _continue_drains(task: PoolTask, steps: PoolSteps) -> None:
    handled = {mark.uid for mark in steps.mark}
    for pod in task.pods:
        if not is_draining(pod) or pod.uid in handled:
            continue
        steps.again(1.0)
        step = continue_drain(pod, task.now, task.drain_seconds, move=task.can_move(pod))
        steps.add(step)
        if step.delete is not None:
            left = pod.state is not None and not pod.state.idle
            how = "its drain time is used up" if left else "drained"
            steps.notes.append(Note("Deleting", f"{pod.name}: {how}", warning=left))
    if steps.mark:
        steps.again(1.0)


def _undo_drains(task: PoolTask, steps: PoolSteps) -> None:
    """Nobody but the operator takes a worker out: it would miss in the pool and never return."""
    handled = {mark.uid for mark in steps.mark} | {item.uid for item in steps.delete}
    for pod in task.pods:
        if pod.live and pod.state is not None and pod.state.draining and pod.uid not in handled:
            step = undo_drain(pod, task.now, move=task.can_move(pod))
            steps.add(step)
            steps.again(1.0)
            done = "it is replaced" if step.mark is not None else "the drain is undone"
            said = f"{pod.name} drains, but not by the operator: {done}"
            steps.notes.append(Note("DrainUndone", said, warning=True))


def _undo_roles(task: PoolTask, steps: PoolSteps) -> None:
    """A pool's workers have its role: the other pool would lack what they were sized for."""
    for pod in task.pods:
        if not pod.live or pod.told_role in ("", pod.role) or not pod.admin_token:
            continue
        body = {"role": str(pod.role)}
        steps.calls.append(
            EngineCall(ACTION_ROLE, pod.name, pod.ip, pod.ports.http, pod.admin_token, body)
        )
        steps.again(1.0)
        said = f"{pod.name} had the role {pod.told_role}, but not by the operator: it is undone"
        steps.notes.append(Note("RoleUndone", said, warning=True))


def _free_names(task: PoolTask, revision: str) -> Iterator[str]:
    observed = task.observed
    taken = {pod.name for pod in observed.pods}
    for number in count():
        group = stable_id(observed.uid, str(task.role), revision, number)
        name = worker_pod_name(observed.name, task.role, group)
        if name not in taken:
            yield name


def backoff_seconds(restarts: int) -> float:
    """How long a failed pod keeps its place. The first failure is replaced at once."""
    if restarts == 0:
        return 0.0
    return float(min(FIRST_BACKOFF_SECONDS * 2 ** min(restarts - 1, 16), MAX_BACKOFF_SECONDS))


def _backoff_left(pod: WorkerPod, now: datetime) -> float:
    assert pod.failure is not None, "only a failed pod backs off"
    if _was_healthy(pod):
        return 0.0
    due = pod.failure.at + timedelta(seconds=backoff_seconds(pod.restarts))
    return (due - now).total_seconds()


def _restarts_after(pod: WorkerPod) -> int:
    return 1 if _was_healthy(pod) else pod.restarts + 1


def _was_healthy(pod: WorkerPod) -> bool:
    failure = pod.failure
    return failure is not None and (failure.at - pod.created).total_seconds() >= HEALTHY_SECONDS
