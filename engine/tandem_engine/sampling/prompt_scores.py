"""Logprobs of prompt tokens: what the model thought of each one before it read it.

A prompt has many rows, and logits of a large vocabulary are large, so they are made slice by slice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tandem_engine.device import download, upload
from tandem_engine.step import Batch, SampledTokens
from tandem_wire.messages import TokenLogprobs

SLICE_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Logprobs of the S tokens that follow a batch's scored rows; k is the most that one wants."""

    tokens: torch.Tensor  # [S] float32
    top_values: torch.Tensor  # [S, k] float32, best first
    top_ids: torch.Tensor  # [S, k] int64

    def to_host(self) -> "PromptScores":
        """Copies in pinned host memory, complete once the current stream has come this far."""
        return PromptScores(
            download(self.tokens), download(self.top_values), download(self.top_ids)
        )

    def put_into(self, results: list[SampledTokens | None], batch: Batch) -> None:
        """Add them to the results of their items."""
        tokens, values = self.tokens.tolist(), self.top_values.tolist()
        ids = self.top_ids.tolist()
        start = 0
        for rows in batch.scored:
            end = start + rows.end - rows.first
            count = batch.items[rows.item].params.prompt_logprobs or 0
            result = results[rows.item] or SampledTokens([])
            result.prompt_logprobs = [
                TokenLogprobs(tokens[row], ids[row][:count], values[row][:count])
                for row in range(start, end)
            ]
            results[rows.item] = result
            start = end


def flat_rows(batch: Batch, last_rows: Sequence[int]) -> list[int]:
    """The flat rows of a batch's scored tokens; `last_rows` are those of each item's last token."""
    flat: list[int] = []
    for rows in batch.scored:
        first = last_rows[rows.item] + 1 - len(batch.items[rows.item].tokens)
        flat.extend(range(first + rows.first, first + rows.end))
    return flat


def score_prompts(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    batch: Batch,
    *,
    is_first: bool,
) -> PromptScores | None:
    """The logprobs of the tokens that follow the scored rows, of which there is at least one.

    Args:
        logits: [R, C] → [R, V] float32; every rank of the model calls it for the same rows.
        hidden: [S, C] of the scored rows, in the order of `flat_rows`.
        is_first: whether this rank reports; the others return None.
    """
    parts = hidden.split(SLICE_ROWS)
    if not is_first:
        for part in parts:
            logits(part)
        return None
    following: list[int] = []
    for rows in batch.scored:
        item = batch.items[rows.item]
        following += item.prompt_tokens[item.start + rows.first + 1 : item.start + rows.end + 1]
    count = max(batch.items[rows.item].params.prompt_logprobs or 0 for rows in batch.scored)
    targets = upload(following, torch.int64, hidden.device)
    found = []
    for part, wanted in zip(parts, targets.split(SLICE_ROWS), strict=True):
        scores = logits(part).log_softmax(-1)
        top = scores.topk(min(count, scores.shape[1]), dim=-1)
        found.append((scores.gather(1, wanted[:, None]).squeeze(1), top.values, top.indices))
    tokens, values, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return PromptScores(tokens, values, ids)
