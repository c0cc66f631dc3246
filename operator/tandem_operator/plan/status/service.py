"""The status of a service: every field and condition, from facts and decisions alone."""

from datetime import datetime

from tandem_operator.api import InferenceServiceStatus
from tandem_operator.api.conditions import ConditionType, Judgement
from tandem_operator.api.status import MAX_DECISIONS, RouterStatus, SloClassStatus, SloStatus
from tandem_operator.facts.observed import Observed
from tandem_operator.facts.scaling import Reading
from tandem_operator.facts.signals import ClassSignals
from tandem_operator.pair import Pair
from tandem_operator.plan.rollout.stage import Stage
from tandem_operator.plan.status.basis import StatusBasis
from tandem_operator.plan.status.conditions import write_conditions
from tandem_operator.plan.status.judgements import judge_service
from tandem_operator.plan.status.pool import count_pool
from tandem_operator.plan.status.transport import judge_transport


def build_status(basis: StatusBasis) -> InferenceServiceStatus:
    """The whole status."""
    observed, spec, old = basis.observed, basis.spec, basis.observed.status
    pools = Pair.build(lambda role: count_pool(basis, role))
    transport_judged, transport = judge_transport(observed, spec, basis.serving, basis.wiring)
    judgements = judge_service(basis, transport_judged)
    router = observed.router
    port = spec.router.service.port
    return InferenceServiceStatus(
        observed_generation=observed.generation,
        revision=basis.serving,
        updated_revision=None if basis.step.stage is Stage.STEADY else basis.target,
        url=f"http://{observed.name}.{observed.namespace}.svc:{port}",
        model=basis.model_name,
        pools=tuple(pools),
        router=RouterStatus(replicas=router.replicas, ready=router.ready)
        if router is not None
        else RouterStatus(),
        ratio=f"{pools.prefill.ready}:{pools.decode.ready}",
        slo=_slo(observed.scaling.reading, old.slo),
        transport=transport,
        scaling=(*basis.scaling.entries, *old.scaling)[:MAX_DECISIONS],
        failures=basis.failures,
        operator=observed.ownership.me or None,
        conditions=write_conditions(old.conditions, judgements, observed.generation, basis.now),
    )


def build_unreadable_status(observed: Observed, now: datetime) -> InferenceServiceStatus:
    """The status of a service whose spec can't be read: every condition, with the reason."""
    judged = Judgement(None, "InvalidSpec", observed.spec_error)
    judgements = dict.fromkeys(ConditionType, judged)
    judgements[ConditionType.READY] = Judgement(False, "InvalidSpec", observed.spec_error)
    judgements[ConditionType.DEGRADED] = Judgement(True, "InvalidSpec", observed.spec_error)
    conditions = write_conditions(observed.status.conditions, judgements, observed.generation, now)
    return observed.status.model_copy(
        update={"observed_generation": observed.generation, "conditions": conditions}
    )


def _slo(reading: Reading | None, old: SloStatus | None) -> SloStatus | None:
    if reading is None or reading.signals.age_seconds > 0:
        return old
    signals = reading.signals
    attained = signals.attained_percent
    found = {
        "ttft_milliseconds": _milliseconds(signals.prefill.ttft_seconds),
        "tbt_milliseconds": _milliseconds(signals.decode.tbt_seconds),
        "attainment_percent": None if attained is None else int(attained),
        "requests_per_second": round(signals.requests_per_second),
    }
    # Without requests there is no latency: the last one stands, beside a rate of zero.
    known = {name: value for name, value in found.items() if value is not None}
    before = old or SloStatus()
    classes = tuple(_slo_class(measured, before) for measured in signals.classes)
    return before.model_copy(update={**known, "classes": classes})


def _slo_class(measured: ClassSignals, before: SloStatus) -> SloClassStatus:
    attained = measured.attained_percent
    found = {
        "ttft_milliseconds": _milliseconds(measured.ttft_seconds),
        "tbt_milliseconds": _milliseconds(measured.tbt_seconds),
        "attainment_percent": None if attained is None else int(attained),
    }
    known = {name: value for name, value in found.items() if value is not None}
    old = next((item for item in before.classes if item.name == measured.name), None)
    return (old or SloClassStatus(name=measured.name)).model_copy(update=known)


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
