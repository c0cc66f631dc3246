"""TransportVerified: whether KV was seen to move, over what, and how fast."""

from typing import Final

from tandem_operator.api.conditions import ConditionType, Judgement, condition_of
from tandem_operator.api.inference_service import InferenceServiceSpec
from tandem_operator.api.kv_transfer import TransferBackend, VerifyMode
from tandem_operator.api.rdma import RdmaMode
from tandem_operator.api.status import ProbedPair, TransportStatus, UnusedPair
from tandem_operator.facts.observed import Observed
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.names.worker import LIBFABRIC_TRANSPORTS
from tandem_operator.plan.links import probed_pairs, rank, serving_workers, unused_pairs

FELL_BACK: Final = "FellBackToTcp"
SOME_FAIL: Final = "SomePairsFail"
OUT_OF_USE: Final = "PairOutOfUse"
PARTIAL: Final = (SOME_FAIL, OUT_OF_USE)
"""Reasons with which KV still moves between other workers: they don't hold Ready back."""


def judge_transport(
    observed: Observed, spec: InferenceServiceSpec, revision: str, wiring: Wiring
) -> tuple[Judgement, TransportStatus]:
    """The condition and status.transport."""
    old = observed.status.transport or TransportStatus()
    status = old.model_copy(update={"wiring": wiring.mode, "pairs": (), "out_of_use": ()})
    if spec.kv_transfer.verify.mode is VerifyMode.OFF:
        return Judgement(None, "NotChecked", "kvTransfer.verify.mode is Off"), status
    pairs = probed_pairs(observed, revision)
    unused = unused_pairs(observed, revision)
    status = status.model_copy(update={"pairs": pairs, "out_of_use": unused})
    status = _with_worst(status, [pair for pair in pairs if not pair.error])
    if unused:
        return _judge_unused(observed, revision, unused), status
    if not pairs:
        return _unseen(observed, revision), status
    problems = [found for pair in pairs if (found := _problem(pair, spec, wiring))]
    if not problems:
        return Judgement(True, "KvMoved", _told(_worst(pairs))), status
    # The first failure is shown whole; the others are in status.transport.pairs.
    reason, message = problems[0]
    if len(problems) == len(pairs):
        return Judgement(False, reason, message), status
    message = f"{len(problems)} of {len(pairs)} pairs of nodes fail: {message}"
    return Judgement(False, SOME_FAIL, message), status


def _unseen(observed: Observed, revision: str) -> Judgement:
    """Before the first probe; after an update of the operator, what it wrote before stands."""
    kept = condition_of(observed.status.conditions, ConditionType.TRANSPORT_VERIFIED)
    if kept is not None and observed.status.revision == revision:
        known = {"True": True, "False": False}.get(str(kept.status))
        return Judgement(known, kept.reason, kept.message)
    message = "waiting for a ready prefill worker and a ready decode worker of this revision"
    return Judgement(None, "WaitingForWorkers", message)


def _judge_unused(observed: Observed, revision: str, unused: tuple[UnusedPair, ...]) -> Judgement:
    told = [f"{pair.decode} takes no KV from {pair.prefill} ({pair.because})" for pair in unused]
    remedy = "run `tandem doctor` on their nodes, or delete the worker whose device fails"
    message = f"{'; '.join(told)}: {remedy}"
    workers = serving_workers(observed, revision)
    named = {(pair.prefill, pair.decode) for pair in unused}
    if all((p.name, d.name) in named for p in workers.prefill for d in workers.decode):
        return Judgement(False, "EveryPairOutOfUse", message)
    return Judgement(False, OUT_OF_USE, message)


def _with_worst(status: TransportStatus, moved: list[ProbedPair]) -> TransportStatus:
    if not moved:
        return status
    worst = _worst(moved)
    return status.model_copy(
        update={
            "backend": worst.backend,
            "passed_over": worst.passed_over,
            "megabytes_per_second": worst.megabytes_per_second,
            "verified_at": max(pair.at for pair in moved),
        }
    )


def _worst(pairs: tuple[ProbedPair, ...] | list[ProbedPair]) -> ProbedPair:
    """The pair with the last backend in the order of Auto; of several, the slowest."""
    return max(pairs, key=lambda pair: (rank(pair.backend), -(pair.megabytes_per_second or 0)))


def _told(pair: ProbedPair) -> str:
    speed = f"{pair.megabytes_per_second} MB/s over {pair.backend}"
    return f"{speed} between {pair.prefill} and {pair.decode}"


def _problem(
    pair: ProbedPair, spec: InferenceServiceSpec, wiring: Wiring
) -> tuple[str, str] | None:
    """Reason and message, if a pair is not as the spec wants it."""
    if pair.error:
        message = f"{pair.decode} could not fetch KV from {pair.prefill}: {pair.error}"
        return "ProbeFailed", message
    seen = _told(pair)
    asked, wanted = spec.kv_transfer.backend, spec.kv_transfer.verify.min_megabytes_per_second
    if asked not in (TransferBackend.AUTO, pair.backend):
        remedy = "check that both pools support it, or set backend: Auto"
        return "OtherBackend", f"{seen}, but kvTransfer.backend is {asked}: {remedy}"
    if (pair.megabytes_per_second or 0) < wanted:
        remedy = "check the network, or lower kvTransfer.verify.minMegabytesPerSecond"
        return "TooSlow", f"{seen}, which is slower than {wanted} MB/s: {remedy}"
    fabric = wiring.mode not in (RdmaMode.NONE, RdmaMode.AUTO)
    plain = pair.backend is TransferBackend.TCP or (
        wiring.mode is RdmaMode.EFA
        and pair.backend not in (*LIBFABRIC_TRANSPORTS, TransferBackend.CUDA_IPC)
    )
    if fabric and plain:
        remedy = "check the devices in the pods, or set rdma.mode: None to use TCP"
        return FELL_BACK, f"{seen}, although RDMA is configured: {remedy}"
    if pair.fell_back_from is not None:
        why = f" ({pair.passed_over})" if pair.passed_over else ""
        remedy = "run `tandem doctor` on their nodes"
        return "FellBack", f"{seen}, which used {pair.fell_back_from} before{why}: {remedy}"
    return None
