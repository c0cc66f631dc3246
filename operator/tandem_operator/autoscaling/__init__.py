"""From measured signals to one decision about both pools.

`collector` reads routers and workers, `histogram` turns counters into quantiles, `signals` is what
they yield, `decide` is the pure function, `state` what it carries from one tick to the next. A
forecasting planner can replace `decide`; everything else stays.
"""

from tandem_operator.autoscaling.decide import PoolSizes, decide
from tandem_operator.autoscaling.decision import Decision
from tandem_operator.autoscaling.signals import DecodeSignals, PrefillSignals, Signals
from tandem_operator.autoscaling.state import ScalerState

__all__ = [
    "Decision",
    "DecodeSignals",
    "PoolSizes",
    "PrefillSignals",
    "ScalerState",
    "Signals",
    "decide",
]
