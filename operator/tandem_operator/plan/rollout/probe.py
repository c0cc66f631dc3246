"""When KV must be seen to move between a prefill and a decode worker."""

from datetime import datetime, timedelta

from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.conditions import ConditionType, condition_of
from tandem_operator.api.kv_transfer import VerifyMode
from tandem_operator.facts.observed import Observed
from tandem_operator.facts.worker import WorkerPod
from tandem_operator.names.worker import ACTION_PROBE
from tandem_operator.pair import Role
from tandem_operator.plan.steps import EngineCall

RETRY = timedelta(seconds=10)
PROBE_BLOCKS = 64
"""KV pages that a probe moves: enough to time, few beside a cache."""


def plan_probe(
    observed: Observed, spec: InferenceServiceSpec, revision: str, now: datetime
) -> EngineCall | None:
    """The probe to make now, if one is due: once per revision, again after a failure."""
    if spec.kv_transfer.verify.mode is VerifyMode.OFF or _verified(observed, revision):
        return None
    last = observed.probe
    if last is not None and last.revision == revision and now - last.at < RETRY:
        return None
    prefill = _ready(observed, Role.PREFILL, revision)
    decode = _ready(observed, Role.DECODE, revision)
    if decode is None or prefill is None:
        return None
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
    )


def _verified(observed: Observed, revision: str) -> bool:
    kept = condition_of(observed.status.conditions, ConditionType.TRANSPORT_VERIFIED)
    verified = kept is not None and str(kept.status) == "True"
    probe = observed.probe
    if probe is not None and probe.revision == revision and not probe.error:
        return True
    return verified and observed.status.revision == revision


def _ready(observed: Observed, role: Role, revision: str) -> WorkerPod | None:
    return next(
        (
            pod
            for pod in observed.pods_of(role)
            if pod.ready
            and pod.live
            and pod.ip
            and pod.revision == revision
            # The decode worker is called, and only where the operator knows its token.
            and (pod.admin_token or role is Role.PREFILL)
        ),
        None,
    )
