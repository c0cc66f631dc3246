"""Random paged KV for attention tests, with NaN in every place that must not be read."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PagedCase:
    """Sequences of `lengths` over shuffled pages; `keys`/`values` [B][S, K, D] are the truth."""

    lengths: list[int]
    key_cache: torch.Tensor  # [N, K, P, D]
    value_cache: torch.Tensor
    block_tables: torch.Tensor  # [B, M] int32
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def make_case(
    lengths: list[int],
    num_kv_heads: int,
    head_dim: int,
    page: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PagedCase:
    """Pages in random order; unused positions and blocks hold NaN."""
    widths = [-(-length // page) for length in lengths]
    num_blocks = sum(widths) + 3
    order = torch.randperm(num_blocks, device=device)
    shape = (num_blocks, num_kv_heads, page, head_dim)
    key_cache = torch.full(shape, float("nan"), dtype=dtype, device=device)
    value_cache = torch.full(shape, float("nan"), dtype=dtype, device=device)
    tables = torch.full((len(lengths), max(widths) + 1), num_blocks + 10**6, device=device)
    keys, values, taken = [], [], 0
    for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        blocks = order[taken : taken + width]
        taken += width
        tables[row, :width] = blocks
        positions = torch.arange(length, device=device)
        at = (blocks[positions // page], slice(None), positions % page)
        sequence = (length, num_kv_heads, head_dim)
        keys.append(torch.randn(sequence, device=device).to(dtype))
        values.append(torch.randn(sequence, device=device).to(dtype))
        key_cache[at], value_cache[at] = keys[-1], values[-1]
    return PagedCase(lengths, key_cache, value_cache, tables.int(), keys, values)


def attend_exactly(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention in float64 of rows at positions start.. : [T, H, D] over [S, K, D]."""
    group = query.shape[1] // keys.shape[1]
    k = keys.double().repeat_interleave(group, dim=1)
    v = values.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,shd->hts", query.double(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(start, start + query.shape[0], device=query.device)[:, None]
    seen = torch.arange(keys.shape[0], device=query.device)[None, :]
    mask = seen <= rows
    if window is not None:
        mask &= seen > rows - window
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; NaN if anything is NaN."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm())
