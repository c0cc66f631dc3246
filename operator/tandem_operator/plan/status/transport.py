"""TransportVerified: whether KV was seen to move, over what, and how fast."""

from tandem_operator.api.conditions import ConditionType, Judgement, condition_of
from tandem_operator.api.inference_service import InferenceServiceSpec
from tandem_operator.api.kv_transfer import TransferBackend, VerifyMode
from tandem_operator.api.rdma import RdmaMode
from tandem_operator.api.status import TransportStatus
from tandem_operator.facts.observed import Observed
from tandem_operator.facts.worker import ProbeResult
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.names.worker import LIBFABRIC_TRANSPORTS

FELL_BACK = "FellBackToTcp"
MAX_REASONS = 1024
"""Characters that the status takes."""


def judge_transport(
    observed: Observed, spec: InferenceServiceSpec, revision: str, wiring: Wiring
) -> tuple[Judgement, TransportStatus]:
    """The condition and status.transport."""
    verify = spec.kv_transfer.verify
    old = observed.status.transport or TransportStatus()
    status = old.model_copy(update={"wiring": wiring.mode})
    if verify.mode is VerifyMode.OFF:
        return Judgement(None, "NotChecked", "kvTransfer.verify.mode is Off"), status
    probe = observed.probe
    if probe is None or probe.revision != revision:
        kept = condition_of(observed.status.conditions, ConditionType.TRANSPORT_VERIFIED)
        if kept is not None and observed.status.revision == revision:
            known = {"True": True, "False": False}.get(str(kept.status))
            return Judgement(known, kept.reason, kept.message), status
        message = "waiting for a ready prefill worker and a ready decode worker of this revision"
        return Judgement(None, "WaitingForWorkers", message), status
    if probe.error:
        message = f"{probe.decode} could not fetch KV from {probe.prefill}: {probe.error}"
        return Judgement(False, "ProbeFailed", message), status
    return _judge_result(probe, spec, wiring, status)


def _judge_result(
    probe: ProbeResult, spec: InferenceServiceSpec, wiring: Wiring, status: TransportStatus
) -> tuple[Judgement, TransportStatus]:
    speed = round(probe.num_bytes / probe.seconds / 1e6) if probe.seconds > 0 else 0
    backend = _backend(probe.transport)
    status = status.model_copy(
        update={
            "backend": backend,
            "passed_over": probe.passed_over[:MAX_REASONS],
            "megabytes_per_second": speed,
            "verified_at": probe.at,
        }
    )
    seen = f"{speed} MB/s over {probe.transport} between {probe.prefill} and {probe.decode}"
    wanted = spec.kv_transfer.verify.min_megabytes_per_second
    fabric = wiring.mode not in (RdmaMode.NONE, RdmaMode.AUTO)
    if spec.kv_transfer.backend not in (TransferBackend.AUTO, backend):
        asked = spec.kv_transfer.backend
        remedy = "check that both pools support it, or set backend: Auto"
        return Judgement(
            False, "OtherBackend", f"{seen}, but kvTransfer.backend is {asked}: {remedy}"
        ), status
    if speed < wanted:
        remedy = "check the network, or lower kvTransfer.verify.minMegabytesPerSecond"
        message = f"{seen}, which is slower than {wanted} MB/s: {remedy}"
        return Judgement(False, "TooSlow", message), status
    plain = backend is TransferBackend.TCP or (
        wiring.mode is RdmaMode.EFA and backend not in LIBFABRIC_TRANSPORTS
    )
    if fabric and plain:
        remedy = "check the devices in the pods, or set rdma.mode: None to use TCP"
        return Judgement(False, FELL_BACK, f"{seen}, although RDMA is configured: {remedy}"), status
    return Judgement(True, "KvMoved", seen), status


def _backend(transport: str) -> TransferBackend | None:
    names = {backend.value.lower(): backend for backend in TransferBackend}
    return names.get(transport.replace("_", "").replace("-", "").lower())
