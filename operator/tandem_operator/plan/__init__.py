"""Makes a plan from facts, without reading or writing anything: `reconcile(observed, now)`."""

from tandem_operator.plan.service import reconcile
from tandem_operator.plan.status.policy import leave_policy
from tandem_operator.plan.steps import Deletion, EngineCall, Note, Plan, PodMark

__all__ = ["Deletion", "EngineCall", "Note", "Plan", "PodMark", "leave_policy", "reconcile"]
