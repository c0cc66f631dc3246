"""What a request's parameters do to its logits before anything is drawn.

In this order, as in vLLM: tokens that may not come yet (min_tokens), logit_bias, repetition
penalty, frequency and presence penalty.
"""

from collections.abc import Sequence

import numpy as np
import torch

from tandem_engine.runner.base import BatchItem, has_penalties


def is_adjusted(item: BatchItem) -> bool:
    """Whether anything here applies to the item."""
    params = item.params
    forced = bool(params.logit_bias) or item.output_position < params.min_tokens
    return forced or has_penalties(params)


def adjust_logits(
    logits: torch.Tensor, items: Sequence[BatchItem], eos_token_ids: Sequence[int]
) -> None:
    """Change `logits` [B, V] in place, one row per item."""
    vocab = logits.shape[1]
    for row, item in enumerate(items):
        if is_adjusted(item):
            _adjust_row(logits[row], item, eos_token_ids, vocab)


def _adjust_row(
    logits: torch.Tensor, item: BatchItem, eos_token_ids: Sequence[int], vocab: int
) -> None:
    params = item.params
    if item.output_position < params.min_tokens:
        stops = list(params.stop_token_ids)
        if not params.ignore_eos:
            stops += eos_token_ids
        logits[[token for token in stops if 0 <= token < vocab]] = float("-inf")
    if params.logit_bias:
        tokens = [token for token in params.logit_bias if 0 <= token < vocab]
        biases = [params.logit_bias[token] for token in tokens]
        logits[tokens] += torch.tensor(biases, dtype=logits.dtype, device=logits.device)
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.array([*item.prompt_tokens, *item.output_tokens], np.int64))
        index = torch.from_numpy(seen[seen < vocab]).to(logits.device)
        values = logits[index]
        penalty = params.repetition_penalty
        logits[index] = torch.where(values > 0, values / penalty, values * penalty)
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        tokens_, counts = np.unique(np.asarray(item.output_tokens, np.int64), return_counts=True)
        index = torch.from_numpy(tokens_).to(logits.device)
        times = torch.from_numpy(counts).to(logits)
        logits[index] -= params.frequency_penalty * times + params.presence_penalty
