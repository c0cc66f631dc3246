"""Angles of the rotary embedding for a step's positions."""

import torch

from tandem_engine.models.rope_spec import RopeSpec


class RotaryAngles:
    """Cosines and sines by position, for one rope of a model.

    Args:
        factors: [head_dim / 2] divisors of the frequencies that replace the spec's scaling.
    """

    def __init__(
        self,
        spec: RopeSpec,
        head_dim: int,
        device: torch.device,
        factors: torch.Tensor | None = None,
    ) -> None:
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / spec.theta**exponent
        if factors is None:
            factors = torch.tensor([spec.divisor(value) for value in frequencies.tolist()])
        self._frequencies = (frequencies / factors.float()).to(device)  # [D/2]

    def at(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, D/2] at positions [T]."""
        angles = positions.float()[:, None] * self._frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)
