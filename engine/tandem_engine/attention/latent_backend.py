"""What a model asks of latent attention, whatever computes it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from tandem_engine.attention.backend import StepTensors


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """One layer's: of the latents' norm, and of the projection to keys and values."""

    norm: torch.Tensor  # [R]
    up_projection: torch.Tensor  # [H · (C + V), R]: each head's rows of keys, then of values
    epsilon: float


class LatentBackend(ABC):
    """Writes a step's latents into the pages and attends over them.

    Legend: T tokens, H heads, R rank of the latent, P size of a query's rotated part, C size of the
    part that is not rotated, V size of a head's values.

    The runner owns the KV cache and lends it for the backend's lifetime. For each step it calls
    `plan` once, then `attend` once per layer, in order, from one thread.
    """

    @abstractmethod
    def plan(self, step: StepTensors) -> None:
        """Prepare what all layers of this step share."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        latents: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        weights: LatentWeights,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Norm and rotate, store the step's latents of one layer, attend causally.

        Args:
            query: [T, H, C + P].
            latents: [T, R + P], as projected.
            angles: cosines and sines [T, P/2].
            out: [T, H · V]; rows that belong to no decode and no chunk are left as they are.

        Returns:
            attn_output [T, H · V], which is `out` where that is given.
        """
