"""The pods of one pool: create, replace, take out.

Counting is level-based: what is wanted minus what lives. A failed pod stays as evidence until its
back-off is over and then gives its place, with the count of failures in a row, to its replacement.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tandem_operator.facts.observed import Observed, WorkerPod
from tandem_operator.names.objects import stable_id, worker_pod_name
from tandem_operator.pair import Role
from tandem_operator.plan.rollout.drain import (
    DrainStep,
    can_move,
    cancel_drain,
    choose_victim,
    continue_drain,
    start_drain,
)
from tandem_operator.plan.steps import Deletion, EngineCall, Note, PodMark

FIRST_BACKOFF_SECONDS = 2.0
MAX_BACKOFF_SECONDS = 300.0
HEALTHY_SECONDS = 600.0
"""A worker that ran this long starts the count of failures anew."""


@dataclass(frozen=True)
class NewWorker:
    """A worker to create."""

    name: str
    restarts: int


@dataclass
class PoolSteps:
    """What to do to the pods of one pool; filled while planning."""

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


def plan_pool(
    observed: Observed,
    role: Role,
    desired: int,
    grow: str,
    keep: frozenset[str] | None,
    drain_seconds: int,
    now: datetime,
) -> PoolSteps:
    """Steps for one role. `grow` and `keep` are those of the roll-out's step."""
    steps = PoolSteps()
    pods = observed.pods_of(role)
    failed = [pod for pod in pods if pod.failure is not None and not pod.deleting]
    if grow:
        mine = tuple(pod for pod in pods if pod.revision == grow)
        _meet_desired(observed, role, desired, grow, mine, failed, steps, now)
    steps.delete.extend(
        Deletion(pod.name, pod.uid)
        for pod in failed
        if pod.revision != grow and (keep is None or bool(grow))
    )
    for pod in pods:
        if keep is not None and pod.revision not in keep and pod.live:
            steps.add(start_drain(pod, now, move=can_move(pod, observed.pods)))
            steps.notes.append(Note("Draining", f"{pod.name}: revision {pod.revision} retires"))
    _continue_drains(observed, pods, drain_seconds, now, steps)
    return steps


def _meet_desired(
    observed: Observed,
    role: Role,
    desired: int,
    revision: str,
    mine: tuple[WorkerPod, ...],
    failed: list[WorkerPod],
    steps: PoolSteps,
    now: datetime,
) -> None:
    live = tuple(pod for pod in mine if pod.live)
    names = _free_names(observed, role, revision)
    missing = desired - len(live)
    for pod in sorted((p for p in failed if p.revision == revision), key=lambda p: p.restarts):
        if missing <= 0:
            steps.delete.append(Deletion(pod.name, pod.uid))
            continue
        missing -= 1
        wait = _backoff_left(pod, now)
        if wait > 0:
            steps.again(wait)
            continue
        new = NewWorker(next(names), _restarts_after(pod))
        steps.create.append(new)
        steps.delete.append(Deletion(pod.name, pod.uid))
        steps.notes.append(Note("Replacing", f"{new.name} replaces {pod.name}, which failed"))
    for pod in mine:
        if missing > 0 and _can_return(pod):
            missing -= 1
            steps.add(cancel_drain(pod))
            steps.notes.append(Note("DrainCancelled", f"{pod.name} is needed again"))
    for _ in range(missing):
        new = NewWorker(next(names), 0)
        steps.create.append(new)
        steps.notes.append(Note("Creating", f"worker {new.name}"))
    if missing < 0:
        _shrink(observed, mine, live, -missing, steps, now)


def _shrink(
    observed: Observed,
    mine: tuple[WorkerPod, ...],
    live: tuple[WorkerPod, ...],
    surplus: int,
    steps: PoolSteps,
    now: datetime,
) -> None:
    unstarted = sorted((p for p in live if not p.started), key=lambda p: p.created, reverse=True)
    for pod in unstarted[:surplus]:
        steps.delete.append(Deletion(pod.name, pod.uid))
        steps.notes.append(Note("Deleting", f"{pod.name} had not started"))
    surplus -= min(surplus, len(unstarted))
    # One at a time: the survivors take over its load before the next one goes.
    if surplus > 0 and not any(_drains(pod) for pod in mine):
        victim = choose_victim(tuple(pod for pod in live if pod.started))
        steps.add(start_drain(victim, now, move=can_move(victim, observed.pods)))
        steps.notes.append(Note("Draining", f"{victim.name} has the least resident work"))
    if surplus > 0:
        steps.again(1.0)


def _continue_drains(
    observed: Observed,
    pods: tuple[WorkerPod, ...],
    drain_seconds: int,
    now: datetime,
    steps: PoolSteps,
) -> None:
    handled = {mark.uid for mark in steps.mark}
    for pod in pods:
        if not _drains(pod) or pod.uid in handled:
            continue
        steps.again(1.0)
        step = continue_drain(pod, now, drain_seconds, move=can_move(pod, observed.pods))
        steps.add(step)
        if step.delete is not None:
            left = pod.load is not None and not pod.load.idle
            how = "its drain time is over" if left else "drained"
            steps.notes.append(Note("Deleting", f"{pod.name}: {how}", warning=left))
    if steps.mark:
        steps.again(1.0)


def _drains(pod: WorkerPod) -> bool:
    return pod.draining_since is not None and not pod.deleting and pod.failure is None


def _can_return(pod: WorkerPod) -> bool:
    # A worker whose streams were asked to move would come back empty: still warmer than a new one.
    return _drains(pod) and pod.ready and pod.load is not None


def _free_names(observed: Observed, role: Role, revision: str) -> Iterator[str]:
    taken = {pod.name for pod in observed.pods}
    number = 0
    while True:
        group = stable_id(observed.uid, str(role), revision, number)
        name = worker_pod_name(observed.name, role, group)
        number += 1
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
