"""The drain of one worker, step by step: mark, finish or move, leases to zero, delete."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from tandem_operator.facts.worker import WorkerPod
from tandem_operator.names.annotations import ANNOTATION_DRAINING, ANNOTATION_MOVING
from tandem_operator.names.worker import ACTION_DRAIN, ACTION_UNDRAIN
from tandem_operator.pair import Role
from tandem_operator.plan.steps import Deletion, EngineCall, PodMark

SETTLE_SECONDS = 2.0
"""An idle worker is not deleted before this time, so that every router has seen the mark."""
UNREACHABLE_SECONDS = 30.0
"""A worker that doesn't answer is deleted after this time: SIGTERM makes it drain by itself."""
FINAL_GRACE_SECONDS = 30
"""The grace period of a worker that has used up its drain time."""


@dataclass(frozen=True)
class DrainStep:
    """What to do with a worker now; an empty step means to wait."""

    mark: PodMark | None = None
    call: EngineCall | None = None
    delete: Deletion | None = None


def start_drain(pod: WorkerPod, now: datetime, *, move: bool) -> DrainStep:
    """Start to drain a worker: routers see the mark, and after the call it refuses new work."""
    if not pod.started:
        return DrainStep(delete=Deletion(pod.name, pod.uid))
    annotations: dict[str, str | None] = {ANNOTATION_DRAINING: now.isoformat()}
    if not pod.admin_token:
        return DrainStep(PodMark(pod.name, pod.uid, annotations))
    if move:
        annotations[ANNOTATION_MOVING] = "true"
    return DrainStep(PodMark(pod.name, pod.uid, annotations), _call(pod, move=move))


def continue_drain(pod: WorkerPod, now: datetime, drain_seconds: int, *, move: bool) -> DrainStep:
    """The next step for a marked worker. `move`: others could take its streams."""
    since = pod.draining_since
    assert since is not None, "only a marked worker drains"
    elapsed = now - since
    if elapsed >= timedelta(seconds=drain_seconds):
        return DrainStep(delete=Deletion(pod.name, pod.uid, FINAL_GRACE_SECONDS))
    state = pod.state
    if state is None:
        gone = not pod.started or elapsed >= timedelta(seconds=UNREACHABLE_SECONDS)
        return DrainStep(delete=Deletion(pod.name, pod.uid)) if gone else DrainStep()
    settled = elapsed >= timedelta(seconds=SETTLE_SECONDS)
    if not pod.admin_token:
        # It can't be called, but SIGTERM makes it drain as well.
        return DrainStep(delete=Deletion(pod.name, pod.uid)) if settled else DrainStep()
    if not state.draining:
        return DrainStep(call=_call(pod, move=pod.moving or move))
    if state.idle:
        return DrainStep(delete=Deletion(pod.name, pod.uid)) if settled else DrainStep()
    late = elapsed >= timedelta(seconds=drain_seconds / 2)
    if not pod.moving and (move or late):
        mark = PodMark(pod.name, pod.uid, {ANNOTATION_MOVING: "true"})
        return DrainStep(mark, _call(pod, move=True))
    return DrainStep()


def cancel_drain(pod: WorkerPod) -> DrainStep:
    """Stop the drain of a worker, because the pool has to grow again."""
    removed: dict[str, str | None] = {ANNOTATION_DRAINING: None, ANNOTATION_MOVING: None}
    return DrainStep(
        PodMark(pod.name, pod.uid, removed), _undrain(pod) if pod.admin_token else None
    )


def undo_drain(pod: WorkerPod, now: datetime, *, move: bool) -> DrainStep:
    """What to do with a live worker that drains although the operator didn't mark it.

    Somebody else told it to, or a call that ended a drain was lost: the worker is told to work
    again. One that can't be called, or doesn't follow (it was sent SIGTERM, say), is replaced.
    """
    since = pod.ready_since if not pod.ready else None
    deaf = since is not None and now - since >= timedelta(seconds=UNREACHABLE_SECONDS)
    if deaf or not pod.admin_token:
        return start_drain(pod, now, move=move)
    return DrainStep(call=_undrain(pod))


def choose_victim(pods: tuple[WorkerPod, ...]) -> WorkerPod:
    """The worker whose loss costs least: one that has not started, one that is not ready, then by
    the annotation `tandem.dev/cost`, then by resident work, then the newest."""

    def cost(pod: WorkerPod) -> tuple[bool, bool, int, int, float]:
        state = pod.state
        resident = state.num_running + state.num_leases if state is not None else 0
        return (pod.started, pod.ready, pod.cost, resident, -pod.created.timestamp())

    return min(pods, key=cost)


def can_move(pod: WorkerPod, pods: tuple[WorkerPod, ...]) -> bool:
    """Whether another ready decode worker of the same revision could take the streams."""
    return pod.role is Role.DECODE and any(
        other.ready and other.live and other.revision == pod.revision and other.uid != pod.uid
        for other in pods
        if other.role is Role.DECODE
    )


def is_draining(pod: WorkerPod) -> bool:
    """Whether it was marked, and is neither gone nor being deleted yet."""
    return pod.draining_since is not None and not pod.deleting and pod.failure is None


def can_return(pod: WorkerPod) -> bool:
    """Whether a draining worker could take work again.

    One whose streams were asked to move would come back empty: still warmer than a new one.
    """
    return is_draining(pod) and pod.ready and pod.state is not None


def _undrain(pod: WorkerPod) -> EngineCall:
    return EngineCall(ACTION_UNDRAIN, pod.name, pod.ip, pod.ports.http, pod.admin_token)


def _call(pod: WorkerPod, *, move: bool) -> EngineCall:
    body = {"move_streams": move}
    return EngineCall(ACTION_DRAIN, pod.name, pod.ip, pod.ports.http, pod.admin_token, body)
