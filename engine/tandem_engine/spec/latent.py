"""Multi-head latent attention, as data (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Sizes of the projections. All are per head, except the ranks and the shared key.

    `interleaved`: the rotation pairs (2i, 2i + 1) instead of (i, i + rope_dim / 2).
    """

    rank: int
    """Size of the latent that keys and values are made from."""
    rope_dim: int
    """Size of the rotated part of queries, and of the one key that all heads share."""
    nope_dim: int
    """Size of the part of queries and keys that is not rotated."""
    value_dim: int
    query_rank: int | None = None
    """Size of the latent that queries are made from; None: queries are projected in one step."""
    interleaved: bool = True
    norm_epsilon: float = 1e-6
    """Epsilon of the latents' norms; the config's epsilon is for all other norms."""

    @property
    def width(self) -> int:
        """Numbers that the cache keeps per token and layer."""
        return self.rank + self.rope_dim

    @property
    def query_dim(self) -> int:
        """Size of one head's query."""
        return self.nope_dim + self.rope_dim
