"""One token per row of logits, and its logprobs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tandem_engine.device import download, upload
from tandem_engine.sampling.adjustment import adjust_batch, adjust_logits, is_adjusted
from tandem_engine.sampling.seen_tokens import SeenTokens
from tandem_engine.step import BatchItem, SampledTokens
from tandem_kernels.sampling import argmax, draw
from tandem_wire.messages import TokenLogprobs

_GREEDY_BELOW: Final = 1e-5
"""Temperatures below this count as 0, since dividing by them would overflow."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Logprobs of the r rows that ask for them; k is the most that any of them wants."""

    rows: tuple[int, ...]
    chosen: torch.Tensor  # [r] float32
    top_values: torch.Tensor  # [r, k] float32, best first
    top_ids: torch.Tensor  # [r, k] int64


@dataclass(frozen=True, slots=True)
class Choice:
    """A step's tokens on the device where they were sampled. Nothing has waited for it yet."""

    tokens: torch.Tensor  # [R] int64
    logprobs: Logprobs | None

    def to_host(self) -> "Choice":
        """Copies in pinned host memory, complete once the current stream has come this far."""
        found = self.logprobs
        if found is not None:
            found = Logprobs(
                found.rows,
                download(found.chosen),
                download(found.top_values),
                download(found.top_ids),
            )
        return Choice(download(self.tokens), found)

    def read(self, items: Sequence[BatchItem]) -> list[SampledTokens]:
        """The tokens, in the order of `items`, on the host."""
        sampled = [SampledTokens([token]) for token in self.tokens.tolist()]
        if self.logprobs is not None:
            chosen = self.logprobs.chosen.tolist()
            ids, values = self.logprobs.top_ids.tolist(), self.logprobs.top_values.tolist()
            for at, row in enumerate(self.logprobs.rows):
                count = items[row].params.logprobs or 0
                found = TokenLogprobs(chosen[at], ids[at][:count], values[at][:count])
                sampled[row].logprobs = [found]
        return sampled


class Sampler:
    """Chooses tokens. A token depends on the logits, the item and its seed alone."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._seen: SeenTokens | None = None  # on a GPU, from the first penalty on

    def sample(self, logits: torch.Tensor, items: Sequence[BatchItem]) -> list[SampledTokens]:
        """One token per item, waiting for it; see `choose`."""
        return self.choose(logits, items).read(items)

    def choose(
        self,
        logits: torch.Tensor,
        items: Sequence[BatchItem],
        greedy: torch.Tensor | None = None,
    ) -> Choice:
        """One token per item.

        Logprobs are those of the model itself: before penalties, bias, temperature and filters.

        Args:
            logits: [B, V], any float type; left as they are.
            greedy: [B] int64, their argmax if it is known; overwritten by the chosen tokens.
        """
        wanting = [row for row, item in enumerate(items) if item.params.logprobs is not None]
        scores = logits
        if wanting:
            scores = logits[upload(wanting, torch.int64, logits.device)].float().log_softmax(-1)
        if any(is_adjusted(item) for item in items):
            logits, best = self._adjust(logits, items)
            greedy = best if greedy is None else greedy.copy_(best)
        tokens = argmax(logits) if greedy is None else greedy
        random = [i for i, item in enumerate(items) if item.params.temperature >= _GREEDY_BELOW]
        if random:
            drawing = [items[index] for index in random]
            if len(random) == len(items):
                tokens.copy_(_draw(logits, drawing, tokens))
            else:
                rows = upload(random, torch.int64, logits.device)
                tokens[rows] = _draw(logits[rows], drawing, tokens[rows])
        return Choice(tokens, _report(scores, tokens, wanting, items) if wanting else None)

    def _adjust(
        self, logits: torch.Tensor, items: Sequence[BatchItem]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits after penalties and bias, and their argmax."""
        if not logits.is_cuda:
            logits = logits.to(torch.float32, copy=True)
            adjust_logits(logits, items, self._eos_token_ids)
            return logits, argmax(logits)
        if self._seen is None:
            self._seen = SeenTokens(logits.shape[1], logits.device)
        return adjust_batch(logits, items, self._eos_token_ids, self._seen)


def _draw(logits: torch.Tensor, items: Sequence[BatchItem], best: torch.Tensor) -> torch.Tensor:
    """A random token [B] for each row of [B, V], whose argmax is `best`."""
    params = [item.params for item in items]
    temperature, top_p, min_p = _columns(
        [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]],
        torch.float32,
        logits.device,
    )
    top_k, seeds, positions = _columns(
        [
            [max(p.top_k, 0) for p in params],
            [p.seed for p in params],
            [item.output_position for item in items],
        ],
        torch.int64,
        logits.device,
    )
    logits = logits if logits.is_cuda else logits.float()
    searched = any(p.top_k > 0 or p.top_p < 1.0 for p in params)
    return draw(logits, temperature, top_k, top_p, min_p, seeds, positions, best, searched)


def _columns(
    values: list[list[float]] | list[list[int]], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[columns, B] in one transfer."""
    count = len(values[0])
    # Each starts at a multiple of 16 bytes: Triton compiles a kernel again for every alignment.
    host = torch.zeros((len(values), -(-count // 4) * 4), dtype=dtype)
    host[:, :count] = torch.tensor(values, dtype=dtype)
    return upload(host, dtype, device)[:, :count]


def _report(
    scores: torch.Tensor, tokens: torch.Tensor, rows: list[int], items: Sequence[BatchItem]
) -> Logprobs:
    """Logprobs of the chosen tokens and the highest ones, from scores [r, V]."""
    most = max(items[row].params.logprobs or 0 for row in rows)
    of_rows = tokens[upload(rows, torch.int64, tokens.device)]
    chosen = scores.gather(1, of_rows[:, None]).squeeze(1)
    values, ids = scores.topk(min(most, scores.shape[1]), dim=-1)
    return Logprobs(tuple(rows), chosen, values, ids)
