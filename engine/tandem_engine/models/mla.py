"""The projections of multi-head latent attention.

Legend: T tokens of the step, C hidden size, H heads, R latent rank, W = R + the shared key's size,
Q size of one head's query, V of its values.
"""

import torch

from tandem_engine.attention.backend import AttentionBackend
from tandem_engine.attention.latent_backend import LatentBackend, LatentWeights
from tandem_engine.models.layers import Linear, Parameters
from tandem_engine.models.spec import ModelSpec
from tandem_kernels.norm import rms_norm


class LatentAttention:
    """Queries and latents from hidden states, up to the values that the heads found."""

    def __init__(
        self,
        spec: ModelSpec,
        parameters: Parameters,
        number: int,
    ) -> None:
        latent = spec.latent
        assert latent is not None
        prefix = f"layers.{number}"
        self.number = number
        self.latent = latent
        # The query's first projection and the latent's in one product.
        self.inward = Linear(parameters, f"{prefix}.latent_in")
        self.query_norm = parameters.get(f"{prefix}.query_latent_norm.weight")
        self.query_up: Linear | None = None
        if self.query_norm is not None:
            self.query_up = Linear(parameters, f"{prefix}.query_up")
        self.weights = LatentWeights(
            norm=parameters[f"{prefix}.latent_norm.weight"],
            up_projection=parameters[f"{prefix}.latent_up.weight"],
            epsilon=latent.norm_epsilon,
        )

    def __call__(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        attention: AttentionBackend | LatentBackend,
    ) -> torch.Tensor:
        """[T, C] → [T, H · V]; the tokens' latents go to the pages."""
        assert isinstance(attention, LatentBackend)
        query, latents = self.inward(x).split_with_sizes(
            [self.inward.weight.shape[0] - self.latent.width, self.latent.width], dim=-1
        )
        if self.query_up is not None and self.query_norm is not None:
            query = self.query_up(rms_norm(query, self.query_norm, self.latent.norm_epsilon))
        # A rank of a tensor-parallel group has a part of the heads.
        heads = query.reshape(x.shape[0], -1, self.latent.query_dim)  # [T, H, Q]
        return attention.attend(self.number, heads, latents, angles, self.weights)
