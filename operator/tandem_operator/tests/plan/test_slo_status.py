"""What status.slo shows of each class."""

from typing import Any

from tandem_operator.api import InferenceServiceStatus
from tandem_operator.facts.scaling import Reading, Scaling
from tandem_operator.facts.signals import ClassSignals, Signals
from tandem_operator.plan import reconcile
from tandem_operator.tests.facts import NOW, make_observed


def test_status_has_each_class_and_keeps_its_last_figures() -> None:
    def told(old: InferenceServiceStatus, *classes: ClassSignals) -> InferenceServiceStatus:
        reading = Reading(Signals(age_seconds=0.0, classes=classes), 0.0)
        facts = make_observed(status=old, scaling=Scaling(reading=reading))
        return InferenceServiceStatus.model_validate(reconcile(facts, NOW).status)

    def shown(status: InferenceServiceStatus) -> list[dict[str, Any]]:
        assert status.slo is not None
        return [item.to_manifest() for item in status.slo.classes]

    first = told(InferenceServiceStatus(), ClassSignals("chat", 0.5, 0.02, 97.6))
    chat = {
        "name": "chat",
        "ttftMilliseconds": 500,
        "tbtMilliseconds": 20,
        "attainmentPercent": 97,
    }
    assert shown(first) == [chat]
    later = told(first, ClassSignals("chat"), ClassSignals("batch"))
    assert shown(later) == [chat, {"name": "batch"}]
    assert shown(told(later, ClassSignals("batch"))) == [{"name": "batch"}]
