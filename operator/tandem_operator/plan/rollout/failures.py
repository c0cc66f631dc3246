"""Keeps evidence of crashes when the pod is gone, and finds the node where workers keep failing."""

from collections import Counter
from datetime import datetime, timedelta

from tandem_operator.api.status import MAX_FAILURES, Failure
from tandem_operator.facts.observed import Observed
from tandem_operator.names.objects import pool_name
from tandem_operator.pair import Role
from tandem_operator.plan.steps import Note

NODE_FAILURES = 3
NODE_WINDOW = timedelta(minutes=30)


def keep_evidence(observed: Observed) -> tuple[tuple[Failure, ...], list[Note]]:
    """The failures for status, newest first, and an event for each new one."""
    known = {(failure.pod, failure.at) for failure in observed.status.failures}
    fresh: list[Failure] = []
    for pod in observed.pods:
        failure = pod.failure
        if failure is None or (pod.name, failure.at) in known:
            continue
        fresh.append(
            Failure(
                pod=pod.name,
                node=pod.node,
                exit_code=failure.exit_code,
                reason=failure.reason[:256],
                at=failure.at,
                log=failure.log[-4096:],
            )
        )
    merged = sorted([*fresh, *observed.status.failures], key=lambda item: item.at, reverse=True)
    notes = [
        Note(
            "WorkerFailed",
            f"{item.pod} on {item.node or 'no node'}: {item.reason or 'ended'}"
            + (f", exit code {item.exit_code}" if item.exit_code is not None else "")
            + ": the last lines of its log are in status.failures",
            warning=True,
        )
        for item in fresh
    ]
    return tuple(merged[:MAX_FAILURES]), notes


def failing_node(
    observed: Observed, failures: tuple[Failure, ...], revision: str, now: datetime
) -> str:
    """The node on which at least three of a pool's last failures happened recently, or "".

    A node is at fault only if a worker of the same pool and `revision` is ready on another one and
    none is ready there: else it may as well be what the workers run.
    """
    recent = Counter(
        (item.node, role)
        for item in failures
        for role in Role
        if item.node
        and now - item.at <= NODE_WINDOW
        and item.pod.startswith(f"{pool_name(observed.name, role)}-")
    )
    for (node, role), number in recent.most_common():
        well = {
            pod.node
            for pod in observed.pods_of(role)
            if pod.ready and pod.live and pod.revision == revision
        }
        if number >= NODE_FAILURES and well and node not in well:
            return node
    return ""
