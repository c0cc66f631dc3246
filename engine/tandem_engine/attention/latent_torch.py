"""Latent attention by the reference ops in torch: the CPU's backend, which the GPU's must match."""

import torch

from tandem_engine.attention.backend import StepTensors
from tandem_engine.attention.latent_backend import LatentBackend, LatentWeights
from tandem_engine.attention.torch_backend import join_outputs
from tandem_engine.spec.model import ModelSpec
from tandem_kernels.mla import decode_attention, extend_attention, rope_and_write


class TorchLatentAttention(LatentBackend):
    """Decodes over the latents, the projections absorbed into queries and outputs.

    For chunks the latents are projected up to keys and values first.

    Args:
        kv_cache: [layers, 1, N, 1, page, R + P].
    """

    def __init__(self, spec: ModelSpec, kv_cache: torch.Tensor) -> None:
        assert spec.latent is not None
        self._latent = spec.latent
        self._scale = spec.attention_scale
        self._caches = [layer[0] for layer in kv_cache]
        self._step: StepTensors | None = None

    def plan(self, step: StepTensors) -> None:
        self._step = step

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        latents: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        weights: LatentWeights,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        step, nope, cache = self._step, self._latent.nope_dim, self._caches[layer]
        assert step is not None, "plan() comes before attend()"
        rotated = rope_and_write(
            latents,
            query[..., nope:],
            weights.norm,
            *angles,
            cache,
            step.slot_blocks,
            step.slot_offsets,
            weights.epsilon,
            self._latent.interleaved,
        )
        outputs = []  # each [*, H, V]
        count = step.num_decodes
        if count:
            outputs.append(
                self._decode(step, query[:count, :, :nope], rotated[:count], cache, weights)
            )
        if step.chunks:
            query = torch.cat((query[..., :nope], rotated), dim=-1)
        for chunk, table in zip(step.chunks, step.chunk_tables, strict=True):
            rows = query[chunk.row : chunk.row + chunk.num_tokens]
            outputs.append(
                extend_attention(
                    rows,
                    cache,
                    table,
                    chunk.start,
                    weights.up_projection,
                    self._scale,
                )
            )
        return join_outputs(outputs, out)

    def _decode(
        self,
        step: StepTensors,
        query: torch.Tensor,
        rotated: torch.Tensor,
        cache: torch.Tensor,
        weights: LatentWeights,
    ) -> torch.Tensor:
        """Both parts of the queries, [B, H, C] and [B, H, P] → attn_output [B, H, V]."""
        nope = self._latent.nope_dim
        heads = weights.up_projection.view(query.shape[1], -1, self._latent.rank)  # [H, C + V, R]
        absorbed = torch.bmm(query.transpose(0, 1), heads[:, :nope]).transpose(0, 1)  # [B, H, R]
        latents = self._attend_latents(step, absorbed, rotated, cache)  # [B, H, R]
        attn_output = torch.bmm(latents.transpose(0, 1), heads[:, nope:].transpose(1, 2))
        return attn_output.transpose(0, 1)

    def _attend_latents(
        self,
        step: StepTensors,
        absorbed: torch.Tensor,
        rotated: torch.Tensor,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        """Absorbed [B, H, R], rotated queries [B, H, P] → each head's mean of latents [B, H, R]."""
        tables, lengths = step.decode_tables, step.decode_lengths
        return decode_attention(absorbed, rotated, cache, tables, lengths, self._scale)
