"""A decode step's inputs in plain torch."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """One row per sequence of the step; all [B]."""

    token_ids: torch.Tensor  # int64
    positions: torch.Tensor  # int64
    slot_blocks: torch.Tensor  # int64: the block that takes the token's KV; -1 for padding
    slot_offsets: torch.Tensor  # int64: its place in that block's page
    lengths: torch.Tensor  # int32: positions that exist, this one included; 0 for padding

    def first(self, count: int) -> "DecodeInputs":
        """Views of the first `count` rows."""
        return DecodeInputs(
            self.token_ids[:count],
            self.positions[:count],
            self.slot_blocks[:count],
            self.slot_offsets[:count],
            self.lengths[:count],
        )


def fill_inputs(
    staged: torch.Tensor, sampled: torch.Tensor, tables: torch.Tensor, page: int, out: DecodeInputs
) -> None:
    """Write `out` [B].

    Args:
        staged: [2, B] int32. Row 0: the token's id, or -1 - r for what row r of the step before
            sampled. Row 1: the token's position, or -1 for padding.
        sampled: [S] int64, the tokens of the step before.
        tables: [B, M] int32 block tables.
        page: tokens per page.
    """
    source, position = staged[0].long(), staged[1].long()
    real = position >= 0
    before = sampled[(-1 - source).clamp(min=0, max=sampled.shape[0] - 1)]
    at = position.clamp(min=0)
    blocks = tables.gather(1, (at // page)[:, None]).squeeze(1).long()
    out.token_ids.copy_(torch.where(real, torch.where(source >= 0, source, before), 0))
    out.positions.copy_(at)
    out.slot_blocks.copy_(torch.where(real, blocks, -1))
    out.slot_offsets.copy_(at % page)
    out.lengths.copy_(position + 1)
