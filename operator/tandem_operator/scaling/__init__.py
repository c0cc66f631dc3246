"""Who decides how many workers a pool has, and what becomes of their numbers."""

from tandem_operator.scaling.targets import PoolTarget, Targets, plan_targets

__all__ = ["PoolTarget", "Targets", "plan_targets"]
