"""What a model asks of attention, whatever computes it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: rows [row, row + num_tokens) of the step's flat tensors.

    Their positions begin at `start`.
    """

    row: int
    num_tokens: int
    start: int


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step's tokens, flat: first one row per decoding sequence, then the chunks' rows.

    Legend: T rows, B decoding sequences (padding included), C chunks, M blocks of the longest one.
    """

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slot_blocks: torch.Tensor  # [T] int64: the block that takes the token's KV; -1 for padding
    slot_offsets: torch.Tensor  # [T] int64: the token's place in that block
    decode_tables: torch.Tensor  # [B, M] integers; past a sequence's end any block that exists
    decode_lengths: torch.Tensor  # [B] integers: positions that exist, this token's included
    chunks: tuple[Chunk, ...]  # [C]
    chunk_tables: torch.Tensor  # [C, M] int64: blocks of all positions up to the last, then zeros

    @property
    def num_decodes(self) -> int:
        """Number of decoding sequences, B."""
        return int(self.decode_lengths.shape[0])


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of each query and key head, applied before the rotation."""

    query: torch.Tensor  # [D]
    key: torch.Tensor  # [D]
    epsilon: float
    in_float32: bool


class AttentionBackend(ABC):
    """Writes a step's KV into the pages and attends over them.

    The runner owns the KV cache and lends it for the backend's lifetime. For each step it calls
    `plan` once, then `store` and `attend` once per layer, in order, from one thread.
    """

    @abstractmethod
    def plan(self, step: StepTensors) -> None:
        """Prepare what all layers of this step share."""

    @abstractmethod
    def store(
        self,
        layer: int,
        qkv: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        norms: HeadNorms | None,
    ) -> torch.Tensor:
        """Norm and rotate, and store the step's KV of one layer.

        It depends on the step's slots alone, so that a CUDA graph can hold it.

        Args:
            qkv: [T, (H + 2 K) · D], the fused projection's output; may be changed.
            angles: cosines and sines [T, D/2].

        Returns:
            The queries [T, H, D], perhaps as a view of `qkv`.
        """

    @abstractmethod
    def attend(
        self, layer: int, query: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend causally within the layer's window.

        Args:
            query: [T, H, D], from `store`.
            out: [T, H · D]; rows that belong to no decode and no chunk are left as they are.

        Returns:
            attn_output [T, H · D], which is `out` where that is given.
        """
