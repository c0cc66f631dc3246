"""Filters and draws over logits in plain torch. Legend: B rows, V vocabulary."""

import torch

_FEW = 1024
"""Top-p rarely reaches further down, and a partial sort of 262,144 logits is much cheaper."""


def filter_logits(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Mask what is excluded by top-k, then by top-p among the rest, then by min-p.

    Each filter keeps all tokens that tie with its last one, so the result doesn't depend on an
    order among equals. The most likely token always stays.

    Args:
        logits: [B, V] float32, after temperature.
        top_k: [B] int64, 0 for off.
        top_p: [B], the smallest set whose probabilities sum to at least this; 1 for off.
        min_p: [B], the least share of the highest probability that stays; 0 for off.

    Returns:
        [B, V], excluded logits at -inf.
    """
    vocab = logits.shape[1]
    limited = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    needs_order = (limited < vocab) | (top_p < 1.0)
    lowest = logits.max(dim=-1).values + min_p.log()  # -inf where min-p is off
    if bool(needs_order.any()):
        rows = needs_order.nonzero().squeeze(1)
        cut = _cut(logits[rows], limited[rows], top_p[rows])
        lowest[rows] = torch.maximum(lowest[rows], cut)
    return logits.masked_fill(logits < lowest[:, None], float("-inf"))


def _cut(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The lowest logit [B] that top-k and top-p keep."""
    vocab = logits.shape[1]
    # Without a top-k the denominator is the whole row, however little of it gets sorted.
    unlimited = top_k >= vocab
    few = min(vocab, max(_FEW, int(top_k[~unlimited].max()) if not bool(unlimited.all()) else 0))
    while True:
        values = logits.topk(few, dim=-1).values  # [B, few], descending
        kth = values.gather(1, (top_k.clamp(max=few) - 1)[:, None])  # [B, 1]
        kth = torch.where(unlimited[:, None], float("-inf"), kth)
        total = logits.masked_fill(logits < kth, float("-inf")).logsumexp(-1, keepdim=True)
        kept = values >= kth
        before = ((values - total).exp() * kept).cumsum(-1)
        before = torch.cat((torch.zeros_like(before[:, :1]), before[:, :-1]), dim=-1)
        # A token stays while the tokens above it don't reach top-p by themselves.
        within = kept & ((before < top_p[:, None]) | (top_p[:, None] >= 1.0))
        within[:, 0] = True
        undecided = within[:, -1] & (unlimited & (top_p < 1.0))
        if few == vocab or not bool(undecided.any()):
            break
        few = min(vocab, few * 16)
    last = within.sum(-1, keepdim=True) - 1
    cut = values.gather(1, last).squeeze(1)
    return torch.where(unlimited & (top_p >= 1.0), float("-inf"), cut)


def sample_inverse_cdf(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token id at which the cumulative probability exceeds `uniform`.

    Args:
        logits: [B, V] float32; -inf is never chosen.
        uniform: [B] float64 in [0, 1).

    Returns:
        [B] int64.
    """
    cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    # Below the total even when the product rounds up to it.
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """A token per row, drawn with a number that depends on (seed, position) alone.

    Args:
        logits: [B, V] float32, before temperature.
        temperature: [B] float32, above 0. top_k, top_p, min_p: as in `filter_logits`.
        seeds, positions: [B] int64; all 64 bits of a seed count.

    Returns:
        [B] int64.
    """
    logits = logits / temperature[:, None]
    if bool(((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)).any()):
        logits = filter_logits(logits, top_k, top_p, min_p)
    numbers = [
        uniform(seed, position)
        for seed, position in zip(seeds.tolist(), positions.tolist(), strict=True)
    ]
    return sample_inverse_cdf(
        logits, torch.tensor(numbers, dtype=torch.float64, device=logits.device)
    )


def penalize(
    logits: torch.Tensor,
    seen: torch.Tensor,
    slots: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after a repetition, then a frequency and a presence penalty, and their argmax.

    For every token that was seen, repetition divides a positive logit and multiplies any other.
    Frequency is subtracted once for each time that a token was generated, presence only once.

    Args:
        logits: [B, V], any float dtype; not changed.
        seen: [S, V] int32, for each sequence and token: twice the number of times that the token
            was generated, plus 1 if it is in the prompt.
        slots: [B] int, the row of `seen`; -1 for a row without penalties.
        repetition, frequency, presence: [B] float32; 1, 0 and 0 are off.

    Returns:
        [B, V] float32 and [B] int64.
    """
    penalized = logits.to(torch.float32, copy=True)
    marks = seen[slots.clamp(min=0).long()].where(slots[:, None] >= 0, 0)
    factor = repetition[:, None]
    repeated = torch.where(penalized > 0, penalized / factor, penalized * factor)
    penalized = torch.where(marks > 0, repeated, penalized)
    counts = marks >> 1
    cost = frequency[:, None] * counts + presence[:, None]
    penalized = torch.where(counts > 0, penalized - cost, penalized)
    return penalized, penalized.argmax(-1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from 53 bits of splitmix64 (Steele, Lea and Flood, 2014)."""
    mask, step = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
        return value ^ (value >> 31)

    return (mix(mix(seed + step & mask) + (position + 1) * step & mask) >> 11) * 2.0**-53
