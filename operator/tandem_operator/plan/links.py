"""What is known of the links between workers: the last probe of each pair of nodes, unused pairs.

The record is the status itself, so an operator that restarts knows it. It is of one revision.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final

from tandem_operator.api.kv_transfer import TransferBackend
from tandem_operator.api.status import MAX_PAIRS, MAX_REASONS, ProbedPair, UnusedPair
from tandem_operator.facts.observed import Observed
from tandem_operator.facts.worker import ProbeResult, WorkerPod
from tandem_operator.names.worker import TRANSPORTS
from tandem_operator.pair import Pair, Role

Nodes = tuple[str, str]
"""Where a prefill worker and where a decode worker runs."""
_BACKENDS: Final = {backend.value.lower(): backend for backend in TransferBackend} | {
    "cudaipcring": TransferBackend.CUDA_IPC  # what stands in for it, where it can't do its best
}


def backend_named(transport: str) -> TransferBackend | None:
    """The backend that workers name in their own spelling, such as cudaIpc."""
    return _BACKENDS.get(transport.replace("_", "").replace("-", "").lower())


def rank(backend: TransferBackend | None) -> int:
    """The place of a backend in the order of Auto; less is better."""
    known = [*TRANSPORTS, *(str(item) for item in TransferBackend if item not in TRANSPORTS)]
    return known.index(str(backend)) if backend is not None else len(known)


def serving_workers(observed: Observed, revision: str) -> Pair[tuple[WorkerPod, ...]]:
    """The workers of a revision between which KV can move now."""
    return Pair.build(
        lambda role: tuple(
            pod
            for pod in observed.pods_of(role)
            if pod.ready and pod.live and pod.ip and pod.revision == revision
        )
    )


def pairs_of_nodes(workers: Pair[tuple[WorkerPod, ...]]) -> tuple[Nodes, ...]:
    """The pairs of nodes to probe, as many as the status has room for.

    Each node is in one of the first, so that of a large fleet no node is left out.
    """
    senders, receivers = (sorted({pod.node for pod in pods}) for pods in workers)
    if not senders or not receivers:
        return ()
    longest = max(len(senders), len(receivers))
    first = [(senders[i % len(senders)], receivers[i % len(receivers)]) for i in range(longest)]
    rest = ((sender, receiver) for sender in senders for receiver in receivers)
    return tuple(dict.fromkeys((*first, *rest)))[:MAX_PAIRS]


def probed_pairs(observed: Observed, revision: str) -> tuple[ProbedPair, ...]:
    """The last probe of each pair of nodes that still has workers of the revision."""
    known = {_nodes(pair): pair for pair in _recorded(observed, revision)}
    probe = observed.probe
    if probe is not None and probe.revision == revision:
        nodes = (probe.prefill_node, probe.decode_node)
        before = known.get(nodes)
        if before is None or before.at < probe.at:
            new = _record(probe, before)
            # A failure that goes on is one fact, of the time when it began.
            again = before is not None and new.error and new.error == before.error
            known[nodes] = before if before is not None and again else new
    present = Pair.build(
        lambda role: {pod.node for pod in observed.pods_of(role) if pod.revision == revision}
    )
    kept = [
        pair
        for nodes, pair in sorted(known.items())
        if nodes[0] in present.prefill and nodes[1] in present.decode
    ]
    return tuple(sorted(kept, key=lambda pair: pair.at)[-MAX_PAIRS:])


def _recorded(observed: Observed, revision: str) -> Sequence[ProbedPair]:
    transport = observed.status.transport
    if transport is None or observed.status.revision != revision:
        return ()
    return transport.pairs


def _nodes(pair: ProbedPair) -> Nodes:
    return pair.prefill_node, pair.decode_node


def _record(probe: ProbeResult, before: ProbedPair | None) -> ProbedPair:
    moved = not probe.error and probe.seconds > 0
    backend = backend_named(probe.transport)
    return ProbedPair(
        prefill_node=probe.prefill_node,
        decode_node=probe.decode_node,
        prefill=probe.prefill,
        decode=probe.decode,
        backend=backend,
        fell_back_from=_fell_back_from(backend, before),
        passed_over=probe.passed_over[:MAX_REASONS],
        megabytes_per_second=round(probe.num_bytes / probe.seconds / 1e6) if moved else None,
        latency_microseconds=round(probe.latency_seconds * 1e6) if moved else None,
        at=probe.at,
        error=probe.error[:MAX_REASONS],
    )


def _fell_back_from(
    backend: TransferBackend | None, before: ProbedPair | None
) -> TransferBackend | None:
    """The best backend of this pair so far, if the one of now is worse."""
    if before is None:
        return None
    best = min(before.backend, before.fell_back_from, key=rank)
    if backend is None or rank(backend) > rank(best):
        return best
    return None


def unused_pairs(observed: Observed, revision: str) -> tuple[UnusedPair, ...]:
    """The pairs of workers that are out of use, by the last look at each decode worker."""
    prefill = {pod.name for pod in observed.pods_of(Role.PREFILL) if pod.revision == revision}
    decode = [pod for pod in observed.pods_of(Role.DECODE) if pod.revision == revision]
    transport = observed.status.transport
    before = transport.out_of_use if transport is not None else ()
    found: list[UnusedPair] = []
    for pod in decode:
        found += _unused_by(pod, before)
    return tuple(pair for pair in found if pair.prefill in prefill)[:MAX_PAIRS]


def _unused_by(pod: WorkerPod, before: Iterable[UnusedPair]) -> list[UnusedPair]:
    if pod.links is None:  # it did not answer: what it said before stands
        return [pair for pair in before if pair.decode == pod.name]
    return [
        UnusedPair(
            prefill=trouble.peer,
            decode=pod.name,
            because=f"{trouble.num_faults} faults, the last one: {trouble.reason}"[:MAX_REASONS],
        )
        for trouble in pod.links.troubles
        if trouble.out_of_use
    ]


def changed_pair(
    workers: Pair[tuple[WorkerPod, ...]], pairs: Iterable[ProbedPair]
) -> tuple[WorkerPod, WorkerPod] | None:
    """Two workers whose session uses another backend than the last probe of their nodes did.

    A better one counts only of the two workers that were probed: others of the same nodes may
    differ from them for good.
    """
    known = {_nodes(pair): pair for pair in pairs}
    senders = {pod.name: pod for pod in workers.prefill}
    for receiver in workers.decode:
        for name, transport in (receiver.links.transports if receiver.links else {}).items():
            sender, backend = senders.get(name), backend_named(transport)
            pair = known.get((sender.node, receiver.node)) if sender is not None else None
            if sender is None or pair is None or None in (pair.backend, backend):
                continue
            same = (pair.prefill, pair.decode) == (sender.name, receiver.name)
            if rank(backend) > rank(pair.backend) or (same and backend is not pair.backend):
                return sender, receiver
    return None


def last_probe_at(
    observed: Observed, pairs: Iterable[ProbedPair], revision: str
) -> datetime | None:
    """When any pair of a revision was last probed; None if none ever was."""
    times = [pair.at for pair in pairs]
    if observed.probe is not None and observed.probe.revision == revision:
        times.append(observed.probe.at)
    return max(times, default=None)
