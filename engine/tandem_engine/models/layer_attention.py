"""What a decoder layer's attention is made of, whatever the family.

Legend: T tokens of the step, C hidden size, H query heads, D size of what a head finds.
"""

from abc import ABC, abstractmethod

import torch

from tandem_engine.attention.backend import AttentionBackend
from tandem_engine.attention.latent_backend import LatentBackend

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the step's positions."""
Backend = AttentionBackend | LatentBackend
Projected = tuple[torch.Tensor, ...]
"""What the projections of a step hand to its attention."""


class LayerAttention(ABC):
    """Attention in two halves: the first is the same for all steps of T tokens."""

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """Columns of the products in `project`."""

    @abstractmethod
    def project(
        self, x: torch.Tensor, angles: Angles, attention: Backend, out: Projected | None = None
    ) -> Projected:
        """[T, C] → what `attend` takes; `out` [T, width] of each of `widths` holds the products."""

    @abstractmethod
    def attend(
        self,
        projected: Projected,
        angles: Angles,
        attention: Backend,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """→ [T, H · D], in `out` where it is given."""
