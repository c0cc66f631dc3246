"""When KV must be seen to move between a prefill and a decode worker, and between which.

Before `Ready`, for each revision, and for each pair of nodes that is new; again soon after one that
failed or was too slow, as soon as a session is seen to use another backend, and else once a day.
"""

from datetime import datetime, timedelta
from typing import Final

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.kv_transfer import VerifyMode
from tandem_operator.api.status import ProbedPair
from tandem_operator.facts.observed import Observed
from tandem_operator.facts.worker import WorkerPod
from tandem_operator.names.worker import ACTION_PROBE
from tandem_operator.pair import Pair
from tandem_operator.plan.links import (
    Nodes,
    changed_pair,
    last_probe_at,
    pairs_of_nodes,
    probed_pairs,
    serving_workers,
)
from tandem_operator.plan.steps import EngineCall

RETRY: Final = timedelta(seconds=10)
"""Between any two probes of a service: they share the links with requests."""
SPACING: Final = timedelta(seconds=60)
"""Between two probes of links that are known, and after one that was too slow."""
DAY: Final = timedelta(days=1)
PROBE_BLOCKS: Final = 64
"""KV pages that a probe moves: enough to time, few beside a cache."""

Chosen = tuple[WorkerPod, WorkerPod]


def plan_probe(
    observed: Observed, spec: InferenceServiceSpec, revision: str, now: datetime
) -> EngineCall | None:
    """The probe to make now, if one is due."""
    if spec.kv_transfer.verify.mode is VerifyMode.OFF:
        return None
    pairs = probed_pairs(observed, revision)
    slow = spec.kv_transfer.verify.min_megabytes_per_second
    chosen = _choose(observed, revision, pairs, slow, now)
    if chosen is None:
        return None
    prefill, decode = chosen
    body = {"host": prefill.ip, "port": prefill.ports.bootstrap, "num_blocks": PROBE_BLOCKS}
    return EngineCall(
        ACTION_PROBE,
        decode.name,
        decode.ip,
        decode.ports.http,
        decode.admin_token,
        body,
        prefill.name,
        revision,
        (prefill.node, decode.node),
    )


def _choose(
    observed: Observed,
    revision: str,
    pairs: tuple[ProbedPair, ...],
    slow: int,
    now: datetime,
) -> Chosen | None:
    last = last_probe_at(observed, pairs, revision)
    if last is not None and now - last < RETRY:
        return None
    workers = serving_workers(observed, revision)
    # The decode worker is called, and only where the operator knows its token.
    decode = tuple(pod for pod in workers.decode if pod.admin_token)
    workers = Pair(workers.prefill, decode)
    changed = changed_pair(workers, pairs)
    if changed is not None:
        return changed
    wanted = pairs_of_nodes(workers)
    known = {(pair.prefill_node, pair.decode_node): pair for pair in pairs}
    probed = [known[nodes] for nodes in wanted if nodes in known]
    rested = last is None or now - last >= SPACING
    due = [
        *(nodes for nodes in wanted if nodes not in known),
        *(_nodes(pair) for pair in probed if rested and now - pair.at >= _patience(pair, slow)),
        *_in_turn([_nodes(pair) for pair in probed if pair.error], now),
    ]
    return _on(workers, due[0]) if due else None


def _nodes(pair: ProbedPair) -> Nodes:
    return pair.prefill_node, pair.decode_node


def _patience(pair: ProbedPair, slow: int) -> timedelta:
    """After how long a pair is probed again; one may be slow only because it was busy."""
    is_slow = not pair.error and (pair.megabytes_per_second or 0) < slow
    return SPACING if is_slow else DAY


def _in_turn(failed: list[Nodes], now: datetime) -> list[Nodes]:
    """Pairs of nodes that failed, so that in time each of them is the first."""
    turn = int(now.timestamp() / RETRY.total_seconds()) % len(failed) if failed else 0
    return failed[turn:] + failed[:turn]


def _on(workers: Pair[tuple[WorkerPod, ...]], nodes: Nodes) -> Chosen:
    """The oldest workers on a pair of nodes, which has some."""
    sender = next(pod for pod in workers.prefill if pod.node == nodes[0])
    receiver = next(pod for pod in workers.decode if pod.node == nodes[1])
    return sender, receiver
