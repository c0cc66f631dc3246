"""Cosines and sines of the rotary embedding for a step's positions."""

import torch

from tandem_engine.spec.rope import RopeSpec


class RotaryAngles:
    """Cosines and sines by position, for one rope of a model.

    Args:
        max_position: most positions of a sequence.
        factors: [head_dim / 2] divisors of the frequencies, in place of the spec's scaling.
    """

    def __init__(
        self,
        spec: RopeSpec,
        head_dim: int,
        max_position: int,
        device: torch.device,
        factors: torch.Tensor | None = None,
    ) -> None:
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / spec.theta**exponent
        if factors is None:
            factors = torch.tensor(
                [spec.divisor(value, head_dim) for value in frequencies.tolist()]
            )
        self._frequencies = (frequencies / factors.float().cpu()).to(device)  # [D/2]
        self._max_position = max_position
        self._amplitude = spec.amplitude
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None  # [max_position, D/2] each

    def at(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, D/2] at positions [T]."""
        if not positions.is_cuda:
            return self._compute(positions, dtype)
        if self._tables is None:
            # A lookup is one launch per table and step; computing them would take five.
            every = torch.arange(self._max_position, device=positions.device)
            self._tables = self._compute(every, dtype)
        cos, sin = self._tables
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _compute(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions.float()[:, None] * self._frequencies
        cos, sin = angles.cos() * self._amplitude, angles.sin() * self._amplitude
        return cos.to(dtype), sin.to(dtype)
