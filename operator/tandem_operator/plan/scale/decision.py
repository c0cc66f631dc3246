"""The answer of one tick."""

from dataclasses import dataclass, field

from tandem_operator.facts.scaling import ScalerState


@dataclass(frozen=True)
class Decision:
    """Sizes to work towards, and why.

    `because_prefill` and `because_decode` are one sentence each, also when nothing changes.
    The flags become the conditions of the same names.
    """

    prefill: int
    decode: int
    because_prefill: str
    because_decode: str
    state: ScalerState = field(default_factory=ScalerState)
    metrics_stale: bool = False
    slo_infeasible: str = ""
    gated_by_peer: str = ""
    capacity_unavailable: str = ""
