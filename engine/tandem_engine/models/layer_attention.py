"""The attention of a decoder layer: over keys and values of heads, or over latents.

Legend: T tokens of the step, C hidden size, H query heads, D size of a head's output. Of latents: R
rank, W = R + size of the key that all heads share, Q size of a head's query, V of its values.
"""

from abc import ABC, abstractmethod

import torch

from tandem_engine.attention.backend import AttentionBackend, HeadNorms
from tandem_engine.attention.latent_backend import LatentBackend, LatentWeights
from tandem_engine.models.layers import Linear, Parameters
from tandem_engine.spec.model import ModelSpec
from tandem_kernels.norm import rms_norm

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the step's positions."""
Backend = AttentionBackend | LatentBackend
Projected = tuple[torch.Tensor, ...]
"""What a step's projections pass to its attention."""


class LayerAttention(ABC):
    """Attention in two halves, of which the first depends on the number of tokens alone.

    So a CUDA graph of a number of tokens can hold the first half of any step; see `PieceGraphs`.
    """

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """Columns of each matrix product in `project`."""

    @abstractmethod
    def project(
        self, x: torch.Tensor, angles: Angles, attention: Backend, out: Projected | None = None
    ) -> Projected:
        """[T, C] → what `attend` takes. The products go to `out`, [T, w] per width w."""

    @abstractmethod
    def attend(
        self,
        projected: Projected,
        angles: Angles,
        attention: Backend,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `project` returned → attn_output [T, H · D], in `out` where it is given."""


class HeadAttention(LayerAttention):
    """Attention over the keys and values of heads, projected in one product with the queries."""

    def __init__(self, spec: ModelSpec, parameters: Parameters, number: int) -> None:
        prefix = f"layers.{number}"
        self.number = number
        self.qkv = Linear(parameters, f"{prefix}.qkv")
        self.norms = _head_norms(spec, parameters, prefix)

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of the fused projection."""
        return (self.qkv.weight.shape[0],)

    def project(
        self, x: torch.Tensor, angles: Angles, attention: Backend, out: Projected | None = None
    ) -> Projected:
        """[T, C] → queries [T, H, D]. The tokens' KV goes to the pages."""
        assert isinstance(attention, AttentionBackend)
        qkv = self.qkv(x, None if out is None else out[0])
        return (attention.store(self.number, qkv, angles, self.norms),)

    def attend(
        self,
        projected: Projected,
        angles: Angles,
        attention: Backend,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries [T, H, D] → attn_output [T, H · D]."""
        assert isinstance(attention, AttentionBackend)
        return attention.attend(self.number, projected[0], out)


def _head_norms(spec: ModelSpec, parameters: Parameters, prefix: str) -> HeadNorms | None:
    if not spec.qk_norm:
        return None
    query = parameters[f"{prefix}.query_norm.weight"]
    key = parameters[f"{prefix}.key_norm.weight"]
    return HeadNorms(query, key, spec.norm_epsilon, spec.norm_in_float32)


class LatentAttention(LayerAttention):
    """Attention over latents, from which each head's keys and values are made (DeepSeek's MLA)."""

    def __init__(self, spec: ModelSpec, parameters: Parameters, number: int) -> None:
        latent = spec.latent
        assert latent is not None
        prefix = f"layers.{number}"
        self.number = number
        self.latent = latent
        # The first projections of the query and of the latent, in one product.
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
        """Columns of the first product, and of the query's second one where there is one."""
        products = [self.inward] if self.query_up is None else [self.inward, self.query_up]
        return tuple(product.weight.shape[0] for product in products)

    def project(
        self, x: torch.Tensor, angles: Angles, attention: Backend, out: Projected | None = None
    ) -> Projected:
        """[T, C] → queries [T, H, Q] and latents [T, W]. The products go to `out`, see `widths`."""
        first, last = (None, None) if out is None else (out[0], out[-1])
        query, latents = self.inward(x, first).split_with_sizes(
            [self.inward.weight.shape[0] - self.latent.width, self.latent.width], dim=-1
        )
        if self.query_up is not None and self.query_norm is not None:
            query = self.query_up(rms_norm(query, self.query_norm, self.latent.norm_epsilon), last)
        # H are this rank's heads, which the spec's number need not be.
        return query.reshape(x.shape[0], -1, self.latent.query_dim), latents

    def attend(
        self,
        projected: Projected,
        angles: Angles,
        attention: Backend,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries and latents → attn_output [T, H · V]. The tokens' latents go to the pages."""
        assert isinstance(attention, LatentBackend)
        query, latents = projected
        return attention.attend(self.number, query, latents, angles, self.weights, out)
