"""What the scaler remembers between two ticks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScalerState:
    """Since when each pool could have been smaller (seconds of the caller's clock), or None."""

    prefill_spare_since: float | None = None
    decode_spare_since: float | None = None
