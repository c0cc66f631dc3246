"""What the scaler remembers between two ticks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScalerState:
    """Times of the caller's clock, in seconds; None: not so.

    `…_spare_since`: since when the pool could have been smaller. `no_growth_until`: pods found no
    place, so nothing grows before.
    """

    prefill_spare_since: float | None = None
    decode_spare_since: float | None = None
    no_growth_until: float | None = None
