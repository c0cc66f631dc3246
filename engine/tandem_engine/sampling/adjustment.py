"""What a request's parameters do to its logits before a token is drawn.

The order is vLLM's: tokens that are forbidden until min_tokens, logit_bias, repetition penalty,
frequency and presence penalty.
"""

from collections.abc import Sequence

import numpy as np
import torch

from tandem_engine.device import upload
from tandem_engine.sampling.seen_tokens import SeenTokens
from tandem_engine.step import BatchItem, has_penalties
from tandem_kernels.sampling import penalize
from tandem_wire.messages import SamplingParams


def is_adjusted(item: BatchItem) -> bool:
    """Whether an item's logits are adjusted at all."""
    params = item.params
    forced = bool(params.logit_bias) or item.output_position < params.min_tokens
    return forced or has_penalties(params)


def adjust_logits(
    logits: torch.Tensor, items: Sequence[BatchItem], eos_token_ids: Sequence[int]
) -> None:
    """Adjust `logits` [B, V] in place, one row per item."""
    vocab = logits.shape[1]
    for row, item in enumerate(items):
        if is_adjusted(item):
            _adjust_row(logits[row], item, eos_token_ids, vocab)


def adjust_batch(
    logits: torch.Tensor, items: Sequence[BatchItem], eos_token_ids: Sequence[int], seen: SeenTokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adjust logits [B, V] as `adjust_logits` does, all rows at once, without waiting for the GPU.

    Returns:
        New logits [B, V] float32, and their argmax [B] int64.
    """
    vocab = logits.shape[1]
    banned: list[int] = []
    biased: list[int] = []
    biases: list[float] = []
    for row, item in enumerate(items):
        banned += [row * vocab + token for token in _banned(item, eos_token_ids, vocab)]
        for token, bias in item.params.logit_bias.items() if item.params.logit_bias else ():
            if 0 <= token < vocab:
                biased.append(row * vocab + token)
                biases.append(bias)
    device = logits.device
    if banned or biased:
        logits = logits.to(torch.float32, copy=True)
        flat = logits.view(-1)
        if banned:
            flat[upload(banned, torch.int64, device)] = float("-inf")
        if biased:
            flat[upload(biased, torch.int64, device)] += upload(biases, torch.float32, device)
    factors = upload(_penalties([item.params for item in items]), torch.float32, device)
    slots = seen.update(items)  # may replace the table
    repetition, frequency, presence = factors[:, : len(items)]
    return penalize(logits, seen.table, slots, repetition, frequency, presence)


def _penalties(params: list[SamplingParams]) -> torch.Tensor:
    """[3, B or a little more] on the host: repetition, frequency, presence.

    Each starts at a multiple of 16 bytes: Triton compiles a kernel again for every alignment.
    """
    columns = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    host = torch.zeros((3, -(-len(params) // 4) * 4))
    host[:, : len(params)] = torch.tensor([[getattr(p, name) for p in params] for name in columns])
    return host


def _banned(item: BatchItem, eos_token_ids: Sequence[int], vocab: int) -> list[int]:
    """Tokens that would end the output before min_tokens."""
    if item.output_position >= item.params.min_tokens:
        return []
    stops = list(item.params.stop_token_ids)
    if not item.params.ignore_eos:
        stops += eos_token_ids
    return [token for token in stops if 0 <= token < vocab]


def _adjust_row(
    logits: torch.Tensor, item: BatchItem, eos_token_ids: Sequence[int], vocab: int
) -> None:
    params = item.params
    banned = _banned(item, eos_token_ids, vocab)
    if banned:
        logits[banned] = float("-inf")
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
