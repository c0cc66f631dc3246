"""One token per row of logits, and its logprobs."""

from collections.abc import Sequence
from typing import Final

import torch

from tandem_engine.runner.base import BatchItem, SampledToken
from tandem_engine.sampling.adjustment import adjust_logits, is_adjusted
from tandem_engine.sampling.draw import uniform
from tandem_kernels.sampling import filter_logits, sample_inverse_cdf
from tandem_wire.messages import TokenLogprobs

_GREEDY_BELOW: Final = 1e-5
"""Temperatures under this are taken as 0: dividing by them would overflow."""


class Sampler:
    """Chooses tokens. It keeps no state: a token depends on the logits, the item and its seed."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(self, logits: torch.Tensor, items: Sequence[BatchItem]) -> list[SampledToken]:
        """One token per item.

        Logprobs are those of the model itself: before penalties, bias, temperature and filters.

        Args:
            logits: [B, V] float32, may be changed.
        """
        logprobs: dict[int, torch.Tensor] = {
            row: logits[row].log_softmax(-1)
            for row, item in enumerate(items)
            if item.params.logprobs is not None
        }
        if any(is_adjusted(item) for item in items):
            adjust_logits(logits, items, self._eos_token_ids)
        tokens = logits.argmax(-1)
        random = [i for i, item in enumerate(items) if item.params.temperature >= _GREEDY_BELOW]
        if random:
            rows = torch.tensor(random, device=logits.device)
            tokens[rows] = _draw(logits[rows], [items[index] for index in random])
        chosen: list[int] = tokens.tolist()
        return [
            SampledToken(token, _report(logprobs[row], token, items[row].params.logprobs or 0))
            if row in logprobs
            else SampledToken(token)
            for row, token in enumerate(chosen)
        ]


def _draw(logits: torch.Tensor, items: Sequence[BatchItem]) -> torch.Tensor:
    """A random token [B] for each row of [B, V]."""

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    params = [item.params for item in items]
    logits = logits / column([p.temperature for p in params])[:, None]
    if any(p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in params):
        top_k = column([max(p.top_k, 0) for p in params], torch.int64)
        top_p = column([p.top_p for p in params])
        logits = filter_logits(logits, top_k, top_p, column([p.min_p for p in params]))
    draws = [uniform(item.params.seed, len(item.output_tokens)) for item in items]
    return sample_inverse_cdf(logits, column(draws, torch.float64))


def _report(logprobs: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """The chosen token's logprob and the `count` highest, best first."""
    if count == 0:
        return TokenLogprobs(float(logprobs[token]))
    values, ids = logprobs.topk(min(count, logprobs.shape[0]))
    return TokenLogprobs(float(logprobs[token]), ids.tolist(), values.tolist())
