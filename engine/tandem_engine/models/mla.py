"""The projections of multi-head latent attention.

Legend: T tokens of the step, C hidden size, H heads, R latent rank, W = R + the shared key's size,
Q size of one head's query, V of its values.
"""

import torch

from tandem_engine.attention.latent_backend import LatentBackend, LatentWeights
from tandem_engine.models.layer_attention import Angles, Backend, LayerAttention, Projected
from tandem_engine.models.layers import Linear, Parameters
from tandem_engine.spec.model import ModelSpec
from tandem_kernels.norm import rms_norm


class LatentAttention(LayerAttention):
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

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of the products that `project` makes."""
        products = [self.inward] if self.query_up is None else [self.inward, self.query_up]
        return tuple(product.weight.shape[0] for product in products)

    def project(
        self, x: torch.Tensor, angles: Angles, attention: Backend, out: Projected | None = None
    ) -> Projected:
        """[T, C] → queries [T, H, Q] and latents [T, W]; `out` takes the products, see `widths`."""
        first, last = (None, None) if out is None else (out[0], out[-1])
        query, latents = self.inward(x, first).split_with_sizes(
            [self.inward.weight.shape[0] - self.latent.width, self.latent.width], dim=-1
        )
        if self.query_up is not None and self.query_norm is not None:
            query = self.query_up(rms_norm(query, self.query_norm, self.latent.norm_epsilon), last)
        # A rank of a tensor-parallel group has a part of the heads.
        return query.reshape(x.shape[0], -1, self.latent.query_dim), latents

    def attend(
        self,
        projected: Projected,
        angles: Angles,
        attention: Backend,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `project` made → [T, H · V]; the tokens' latents go to the pages."""
        assert isinstance(attention, LatentBackend)
        query, latents = projected
        return attention.attend(self.number, query, latents, angles, self.weights, out)
