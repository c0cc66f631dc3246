"""From facts to a plan, without reading or writing anything: `reconcile(observed, now) -> Plan`."""

from tandem_operator.reconcile.plan import Deletion, EngineCall, Note, Plan, PodMark
from tandem_operator.reconcile.service import reconcile

__all__ = ["Deletion", "EngineCall", "Note", "Plan", "PodMark", "reconcile"]
