"""Top-k, top-p, min-p and a seeded draw in one launch, without sorting.

All three filters keep the tokens whose logit is at least some threshold, so a row's threshold is
searched: each pass over the row counts (or weighs) what lies above several pivots at once and
keeps the section that holds the answer, until few enough values are left to search in registers.
Sort-free sampling with pivots is FlashInfer's; here the set that is kept is exact, ties included,
as the reference's.
"""

import torch
import triton
import triton.language as tl

_NUM_PIVOTS = 8
"""Sections per pass; also the width of the accumulators."""


@triton.jit
def _weigh(row, size, scale, top, pivots, BY_MASS: tl.constexpr, BLOCK: tl.constexpr,
           PIVOTS: tl.constexpr):  # fmt: skip
    """For each pivot [PIVOTS]: number, and number or mass, of the values at or above it."""
    count = tl.zeros([BLOCK, PIVOTS], tl.int32)
    mass = tl.zeros([BLOCK, PIVOTS], tl.float32)
    places = tl.arange(0, BLOCK)
    for start in range(0, size, BLOCK):
        x = tl.load(row + start + places, mask=start + places < size, other=float("-inf"))
        x = x.to(tl.float32) * scale
        above = x[:, None] >= pivots[None, :]
        count += above.to(tl.int32)
        if BY_MASS:
            weight = tl.exp2(x - top)
            mass += tl.where(above, weight[:, None], 0.0)
    counts = tl.sum(count, axis=0)
    masses = counts.to(tl.float32)
    if BY_MASS:
        masses = tl.sum(mass, axis=0)
    return counts, masses


@triton.jit
def _bound(values, weights, low, high, target, HALVINGS: tl.constexpr):
    """A threshold in [low, high) at or above which `values` alone reach the target, or `low`.

    What a few values of a row reach, all of them reach: so this bounds a search from below, and
    the lanes' maxima bound it so closely that it is over in a pass or two.
    """
    for _ in range(HALVINGS):
        middle = low + (high - low) * 0.5
        reached = tl.sum(tl.where(values >= middle, weights, 0.0), axis=0) >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low


@triton.jit
def _gather(row, size, scale, low, scratch, BLOCK: tl.constexpr, FEW: tl.constexpr):
    """The values at or above `low`, at most FEW of them, in registers [FEW]; -inf fills up."""
    places = tl.arange(0, BLOCK)
    count = size * 0
    for start in range(0, size, BLOCK):
        x = tl.load(row + start + places, mask=start + places < size, other=float("-inf"))
        x = x.to(tl.float32) * scale
        above = (x >= low).to(tl.int32)
        at = count + tl.cumsum(above, axis=0) - 1
        tl.store(scratch + at, x, mask=(above > 0) & (at < FEW))
        count += tl.sum(above, axis=0)
    # Other threads of this program read what these stored.
    tl.debug_barrier()
    kept = tl.arange(0, FEW)
    found = tl.load(scratch + kept, mask=kept < count, other=float("-inf"), cache_modifier=".cg")
    tl.debug_barrier()
    return found


@triton.jit
def _search(row, size, scale, top, low, high, total, target, scratch, BY_MASS: tl.constexpr,
            BLOCK: tl.constexpr, PIVOTS: tl.constexpr, FEW: tl.constexpr):  # fmt: skip
    """The largest threshold in [low, high) at or above which `target` is reached.

    `total`: how many values are at or above `low`. Those at or above `high` don't reach it. Once
    few values are left above `low`, they are gathered and the rest happens in registers.
    """
    steps = tl.arange(0, PIVOTS)
    num_low = total
    searching = (high > low) & (num_low > FEW)
    while searching:
        pivots = low + (high - low) / PIVOTS * steps  # the first is low itself
        counts, reached = _weigh(row, size, scale, top, pivots, BY_MASS, BLOCK, PIVOTS)
        enough = (reached >= target) | (steps == 0)
        kept = tl.max(tl.where(enough, steps, 0), axis=0)
        new_low = tl.max(tl.where(steps == kept, pivots, float("-inf")), axis=0)
        above = tl.min(tl.where(steps > kept, pivots, float("inf")), axis=0)
        new_high = tl.minimum(high, above)
        num_low = tl.sum(tl.where(steps == kept, counts, 0), axis=0)
        # No float between the ends: low is the threshold, many times over.
        searching = ((new_low > low) | (new_high < high)) & (num_low > FEW)
        low = new_low
        high = new_high
    if num_low <= FEW:
        values = _gather(row, size, scale, low, scratch, BLOCK, FEW)
        weights = tl.full([FEW], 1.0, tl.float32)
        if BY_MASS:
            weights = tl.exp2(values - top)
        low = _bound(values, weights, low, high, target, 44)
    return low


@triton.jit
def _mix(value):
    """The finaliser of splitmix64."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def draw_kernel(
    logits,
    inverse_temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    positions,
    out,
    scratch,
    stride,
    size,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
    FEW: tl.constexpr,
):
    """Program: one row. Logits are taken times log2 e / temperature, so that exp2 does."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    few = scratch + index.to(tl.int64) * FEW
    places = tl.arange(0, BLOCK)
    warmth = tl.load(inverse_temperature + index)
    scale = warmth * 1.4426950408889634
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, size, BLOCK):
        inside = start + places < size
        x = tl.load(row + start + places, mask=inside, other=float("-inf")).to(tl.float32) * scale
        highest = tl.maximum(highest, x)
        lowest = tl.minimum(lowest, tl.where(x == float("-inf"), float("inf"), x))
    top = tl.max(highest, axis=0)
    threshold = tl.min(lowest, axis=0)
    # Just above the highest value, whatever its size.
    high = top + tl.abs(top) * 1.0e-6 + 1.0e-30
    k = tl.load(top_k + index)
    p = tl.load(top_p + index)
    if k > 0 and k < size:
        ones = tl.full([BLOCK], 1.0, tl.float32)
        threshold = _bound(highest, ones, threshold, high, k.to(tl.float32), 20)
        ends = tl.where(tl.arange(0, PIVOTS) == 0, threshold, float("inf"))
        counts, _ = _weigh(row, size, scale, top, ends, False, BLOCK, PIVOTS)
        total = tl.sum(counts, axis=0)
        threshold = _search(
            row,
            size,
            scale,
            top,
            threshold,
            high,
            total,
            k.to(tl.float32),
            few,
            False,
            BLOCK,
            PIVOTS,
            FEW,
        )
    if p < 1.0:
        ends = tl.where(tl.arange(0, PIVOTS) == 0, threshold, float("inf"))
        counts, masses = _weigh(row, size, scale, top, ends, True, BLOCK, PIVOTS)
        total = tl.sum(counts, axis=0)
        target = tl.sum(masses, axis=0) * p
        # A little more than the target, as sums in another order round differently.
        bound = _bound(highest, tl.exp2(highest - top), threshold, high, target * 1.0001, 20)
        if bound > threshold:
            threshold = bound
            ends = tl.where(tl.arange(0, PIVOTS) == 0, threshold, float("inf"))
            counts, masses = _weigh(row, size, scale, top, ends, False, BLOCK, PIVOTS)
            total = tl.sum(counts, axis=0)
        threshold = _search(
            row, size, scale, top, threshold, high, total, target, few, True, BLOCK, PIVOTS, FEW
        )
    share = tl.load(min_p + index)
    if share > 0.0:
        threshold = tl.maximum(threshold, top + tl.log2(share))
    threshold = tl.minimum(threshold, top)

    start_state = _mix(tl.load(seeds + index).to(tl.uint64) + 0x9E3779B97F4A7C15)
    position = tl.load(positions + index).to(tl.uint64) + 1
    bits = _mix(start_state + position * 0x9E3779B97F4A7C15) >> 11
    uniform = bits.to(tl.float64) * 1.1102230246251565e-16

    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, size, BLOCK):
        x = tl.load(row + start + places, mask=start + places < size, other=float("-inf"))
        x = x.to(tl.float32) * scale
        mass += tl.where(x >= threshold, tl.exp2(x - top), 0.0).to(tl.float64)
    goal = uniform * tl.sum(mass, axis=0)
    before = goal * 0.0
    base = before
    chosen = index * 0
    start = chosen
    searching = size > 0
    while searching:
        x = tl.load(row + start + places, mask=start + places < size, other=float("-inf"))
        x = x.to(tl.float32) * scale
        weight = tl.where(x >= threshold, tl.exp2(x - top), 0.0)
        part = tl.sum(weight.to(tl.float64), axis=0)
        chosen = tl.where(part > 0.0, start, chosen)
        base = tl.where(part > 0.0, before, base)
        before += part
        start += BLOCK
        searching = (before <= goal) & (start < size)
    # The chunk that crosses the goal, or the last one with any weight if rounding kept it below.
    x = tl.load(row + chosen + places, mask=chosen + places < size, other=float("-inf"))
    x = x.to(tl.float32) * scale
    weight = tl.where(x >= threshold, tl.exp2(x - top), 0.0)
    running = tl.cumsum(weight, axis=0)
    crossed = (running > (goal - base).to(tl.float32)) & (weight > 0.0)
    first = tl.min(tl.where(crossed, places, BLOCK), axis=0)
    last = tl.max(tl.where(weight > 0.0, places, 0), axis=0)
    tl.store(out + index, (chosen + tl.where(first < BLOCK, first, last)).to(tl.int64))


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    block: int | None = None,
    warps: int | None = None,
    few: int = 8192,
) -> torch.Tensor:
    """A token per row: what `filter_logits` and `sample_inverse_cdf` give, in one launch.

    The uniform number depends on (seed, position) alone, as in `reference.uniform`.

    Args:
        logits: [B, V], any float dtype, before temperature; V contiguous, at least one finite.
        temperature: [B] float32, above 0.
        top_k: [B] int, 0 for off. top_p: [B] float32, 1 for off. min_p: [B] float32, 0 for off.
        seeds, positions: [B] int64; a seed's 64 bits are taken as they are.

    Returns:
        [B] int64.
    """
    rows, size = logits.shape
    # Many rows fill the device with small programs; a single one is faster with a large one.
    block = block or (1024 if rows >= 64 else 2048)
    warps = warps or block // 128
    out = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out
    draw_kernel[(rows,)](
        logits,
        1.0 / temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        positions,
        out,
        torch.empty((rows, few), dtype=torch.float32, device=logits.device),
        logits.stride(0),
        size,
        BLOCK=min(block, max(64, triton.next_power_of_2(size))),
        PIVOTS=_NUM_PIVOTS,
        FEW=few,
        num_warps=warps,
    )
    return out
