"""From logits to one token per row: Triton kernels without a sort on CUDA, else plain torch."""

import torch

from tandem_kernels.sampling import reference


def argmax(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The most likely token of each row of [B, V]: [B] int64, the lowest id among equals."""
    if logits.is_cuda:
        from tandem_kernels.sampling import kernel

        return kernel.greedy(logits, out)
    return torch.argmax(logits, dim=-1, out=out)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    best: torch.Tensor | None = None,
    searched: bool = True,
) -> torch.Tensor:
    """A random token for each row of [B, V] under the row's filters.

    `reference.draw` describes the other arguments. `best` is the rows' argmax [B] int64 if it is
    known, and `searched` is False if no row has top-k or top-p; each of them saves a pass.
    """
    rows = (temperature, top_k, top_p, min_p, seeds, positions)
    if logits.is_cuda:
        from tandem_kernels.sampling import draw_kernel

        return draw_kernel.draw(logits, *rows, best=best, searched=searched)
    return reference.draw(logits, *rows)


def penalize(
    logits: torch.Tensor,
    seen: torch.Tensor,
    slots: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Penalised logits [B, V] float32 and their argmax [B]; `reference.penalize` has the rule."""
    if logits.is_cuda:
        from tandem_kernels.sampling import penalty_kernel

        return penalty_kernel.penalize(logits, seen, slots, repetition, frequency, presence)
    return reference.penalize(logits, seen, slots, repetition, frequency, presence)


__all__ = ["argmax", "draw", "penalize"]
