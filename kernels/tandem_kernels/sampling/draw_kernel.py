"""Top-k, top-p, min-p and a seeded draw without sorting, several programs per row.

All three filters keep the tokens whose logit is at least some threshold. A histogram tells which
few bins of a row hold it (`histogram_kernel`); the values in those bins are collected, and the
exact threshold is searched among them alone. The set that is kept is exact, ties included, as the
reference's: logits are compared as they came, through integers in the same order. Sums are taken
in one order each, or of integers, so that a seed always draws the same token.
"""

import torch
import triton
import triton.language as tl

from tandem_kernels.sampling.histogram_kernel import (
    NUM_BINS,
    as_bits,
    bounds_kernel,
    distance_from,
    furthest,
    histogram_kernel,
    is_searched,
)
from tandem_kernels.sampling.kernel import greedy

_LOWEST_KEY = tl.constexpr(-(1 << 31))


@triton.jit
def _key(raw):
    """Integers in the order of float32 values; both zeros are one."""
    bits = (raw + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _load(source, at, inside):
    """float32 values of a row, or of keys that `collect_kernel` wrote; -inf outside."""
    if source.dtype.element_ty == tl.int64:
        key = tl.load(source + at, mask=inside, other=0, cache_modifier=".cg").to(tl.int32)
        raw = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        return tl.where(inside, raw, float("-inf"))
    else:
        return tl.load(source + at, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def collect_kernel(
    logits,
    best,
    temperature,
    top_k,
    top_p,
    min_p,
    bounds,
    offsets,
    above,
    collected,
    stride,
    size,
    capacity,
    BLOCK: tl.constexpr,
):
    """Program (part, row): the mass above the bounds of a searched row, and the values in them.

    Values are left as keys, in the row's order.
    """
    row = tl.program_id(1).to(tl.int64)
    if is_searched(tl.load(top_k + row), tl.load(top_p + row), size):
        part = row * tl.num_programs(0) + tl.program_id(0)
        low = tl.load(bounds + row * 5)
        high = tl.load(bounds + row * 5 + 1)
        count = tl.load(bounds + row * 5 + 4)
        # Rows of what a thread loads at once: ranks within them need no other thread.
        WIDTH: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
        starts = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK // WIDTH) * WIDTH
        at = starts[:, None] + tl.arange(0, WIDTH)[None, :]
        inside = at < size
        raw = tl.load(logits + row * stride + at, mask=inside, other=float("-inf")).to(tl.float32)
        highest = tl.load(logits + row * stride + tl.load(best + row)).to(tl.float32)
        scale = 1.4426950408889634 / tl.load(temperature + row)
        distance = distance_from(highest, raw, scale)
        bits = as_bits(distance)
        sure = inside & (bits < low) & (distance <= furthest(tl.load(min_p + row)))
        mass = tl.sum(tl.where(sure, tl.exp2(-distance), 0.0), axis=1)
        tl.store(above + part, tl.sum(mass, axis=0))
        held = inside & (bits >= low) & (bits <= high)
        begin = tl.load(offsets + part)
        end = count
        if tl.program_id(0) + 1 < tl.num_programs(0):
            end = tl.load(offsets + part + 1)
        # Beyond the capacity the row itself is searched.
        if count <= capacity and begin < end:
            ones = held.to(tl.int32)
            each = tl.sum(ones, axis=1)
            before = begin + tl.cumsum(each, axis=0) - each
            ranks = before[:, None] + tl.cumsum(ones, axis=1) - 1
            to = collected + row * capacity + ranks
            tl.store(to, _key(raw).to(tl.int64), mask=held & (ranks < count))


@triton.jit
def _reach(
    source, num, highest, scale, pivots, BY_MASS: tl.constexpr, TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):  # fmt: skip
    """For each pivot [PIVOTS], how many values have keys at or above it, or what they weigh."""
    places = tl.arange(0, TILE)
    reached = tl.zeros([TILE, PIVOTS], tl.float32)
    for start in range(0, num, TILE):
        inside = start + places < num
        raw = _load(source, start + places, inside)
        weight = tl.where(inside, 1.0, 0.0)
        if BY_MASS:
            weight *= tl.exp2(-distance_from(highest, raw, scale))
        above = _key(raw)[:, None] >= pivots[None, :]
        reached += tl.where(above, weight[:, None], 0.0)
    return tl.sum(reached, axis=0)


@triton.jit
def _search(
    source, num, highest, scale, low, high, target, BY_MASS: tl.constexpr, TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):  # fmt: skip
    """The largest key in [low, high) at or above which the target is reached, or `low`."""
    steps = tl.arange(0, PIVOTS)
    while low + 1 < high:
        width = tl.maximum((high - low) // PIVOTS, 1)
        pivots = low + width * steps
        inside = pivots < high
        reached = _reach(
            source, num, highest, scale, pivots.to(tl.int32), BY_MASS, TILE, PIVOTS
        )  # fmt: skip
        enough = ((reached >= target) & inside) | (steps == 0)
        kept = tl.max(tl.where(enough, steps, 0), axis=0)
        low += width * kept
        high = tl.where(kept == PIVOTS - 1, high, tl.minimum(high, low + width))
    return low


@triton.jit
def _find_threshold(
    source, num, highest, scale, least, most, k, p, whole, above, TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):  # fmt: skip
    """The least key that top-k (of `num` values; 0: off) and then top-p keep.

    `whole` is the mass of the row, `above` what isn't in `source`; `least` and `most` bound the
    bits of the distance.
    """
    places = tl.arange(0, TILE)
    lowest = tl.full([TILE], 0x7FFFFFFF, tl.int32)
    greatest = tl.full([TILE], _LOWEST_KEY, tl.int32)
    for start in range(0, num, TILE):
        inside = start + places < num
        raw = _load(source, start + places, inside)
        bits = as_bits(distance_from(highest, raw, scale))
        held = inside & (bits >= least) & (bits <= most)
        key = _key(raw)
        lowest = tl.minimum(lowest, tl.where(held, key, 0x7FFFFFFF))
        greatest = tl.maximum(greatest, tl.where(held, key, _LOWEST_KEY))
    low = tl.min(lowest, axis=0).to(tl.int64)
    high = tl.max(greatest, axis=0).to(tl.int64) + 1
    if k > 0:
        low = _search(source, num, highest, scale, low, high, k.to(tl.float32), False, TILE, PIVOTS)
        steps = tl.arange(0, PIVOTS)
        reached = _reach(
            source, num, highest, scale, (low + steps * 0).to(tl.int32), True, TILE, PIVOTS
        )  # fmt: skip
        whole = above + tl.sum(tl.where(steps == 0, reached, 0.0), axis=0).to(tl.float64)
    if p < 1.0:
        target = (whole * p - above).to(tl.float32)
        low = _search(source, num, highest, scale, low, high, target, True, TILE, PIVOTS)
    return low


@triton.jit
def _weigh_collected(source, num, highest, scale, threshold, limit, TILE: tl.constexpr):
    """Replace the collected keys by the running mass of what is kept, in units of 2^-36.

    Integers: what lies between two places without any kept value weighs nothing at all.
    """
    places = tl.arange(0, TILE)
    before = threshold * 0
    for start in range(0, num, TILE):
        inside = start + places < num
        raw = _load(source, start + places, inside)
        distance = distance_from(highest, raw, scale)
        kept = inside & (_key(raw) >= threshold) & (distance <= limit)
        units = tl.where(kept, tl.exp2(36.0 - distance), 0.0).to(tl.int64)
        tl.store(source + start + places, before + tl.cumsum(units, axis=0), mask=inside)
        before += tl.sum(units, axis=0)


@triton.jit
def _mix(value):
    """The finaliser of splitmix64."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def _uniform(seed, position):
    """The number in [0, 1) that `reference.uniform` gives."""
    state = _mix(seed.to(tl.uint64) + 0x9E3779B97F4A7C15)
    bits = _mix(state + (position.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15) >> 11
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def draw_kernel(
    logits,
    best,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    positions,
    masses,
    bounds,
    offsets,
    above,
    collected,
    out,
    stride,
    size,
    capacity,
    num_parts,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """Program: one row. Its exact threshold, then the part and the token that the seed draws."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    few = collected + index * capacity
    parts = tl.arange(0, PARTS)
    exists = parts < num_parts
    part_at = index * num_parts + parts
    highest = tl.load(row + tl.load(best + index)).to(tl.float32)
    scale = 1.4426950408889634 / tl.load(temperature + index)
    limit = furthest(tl.load(min_p + index))
    k = tl.load(top_k + index)
    p = tl.load(top_p + index)
    mass = tl.load(masses + part_at, mask=exists, other=0.0).to(tl.float64)
    threshold = index * 0 + _LOWEST_KEY
    if is_searched(k, p, size):
        whole = tl.sum(mass, axis=0)
        least = tl.load(bounds + index * 5)
        most = tl.load(bounds + index * 5 + 1)
        left = tl.load(bounds + index * 5 + 3)
        count = tl.load(bounds + index * 5 + 4)
        if count <= capacity:
            mass = tl.load(above + part_at, mask=exists, other=0.0).to(tl.float64)
            if count > 0:
                sure = tl.sum(mass, axis=0)
                threshold = _find_threshold(
                    few, count, highest, scale, least, most, left, p, whole, sure, TILE, PIVOTS,
                )  # fmt: skip
                _weigh_collected(few, count, highest, scale, threshold, limit, TILE)
                # Other threads of this program read what these stored.
                tl.debug_barrier()
                begin = tl.load(offsets + part_at, mask=exists, other=0)
                more = exists & (parts + 1 < num_parts)
                end = tl.load(offsets + part_at + 1, mask=more, other=0)
                end = tl.where(more, end, count)
                until = tl.load(
                    few + end - 1, mask=exists & (end > 0), other=0, cache_modifier=".cg"
                )
                since = tl.load(
                    few + begin - 1, mask=exists & (begin > 0), other=0, cache_modifier=".cg"
                )
                mass += (until - since).to(tl.float64) * (1.0 / (1 << 36))
        else:
            limited = tl.where((k > 0) & (k < size), k, 0)
            threshold = _find_threshold(
                row, size, highest, scale, least, most, limited, p, whole, whole * 0.0, TILE,
                PIVOTS,
            )  # fmt: skip
            inner = tl.arange(0, BLOCK)
            for start in range(0, size, BLOCK):
                inside = start + inner < size
                raw = _load(row, start + inner, inside)
                distance = distance_from(highest, raw, scale)
                kept = inside & (_key(raw) >= threshold) & (distance <= limit)
                part_mass = tl.sum(tl.where(kept, tl.exp2(-distance), 0.0), axis=0)
                mass = tl.where(parts == start // BLOCK, part_mass.to(tl.float64), mass)

    # The part that crosses the goal, or the last one with any weight if rounding kept it below.
    goal = _uniform(tl.load(seeds + index), tl.load(positions + index)) * tl.sum(mass, axis=0)
    until = tl.cumsum(mass, axis=0)
    crossed = tl.min(tl.where((until > goal) & (mass > 0.0), parts, PARTS), axis=0)
    final = tl.max(tl.where(mass > 0.0, parts, 0), axis=0)
    chosen = tl.where(crossed < PARTS, crossed, final)
    goal -= tl.sum(tl.where(parts < chosen, mass, 0.0), axis=0)
    at = chosen * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    raw = _load(row, at, inside)
    distance = distance_from(highest, raw, scale)
    kept = inside & (_key(raw) >= threshold) & (distance <= limit)
    weight = tl.where(kept, tl.exp2(-distance), 0.0)
    running = tl.cumsum(weight, axis=0)
    crossing = (running > goal.to(tl.float32)) & (weight > 0.0)
    token = tl.min(tl.where(crossing, at, size), axis=0)
    final_token = tl.max(tl.where(weight > 0.0, at, 0), axis=0)
    tl.store(out + index, tl.where(token < size, token, final_token).to(tl.int64))


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
    best: torch.Tensor | None = None,
    searched: bool = True,
    block: int = 2048,
    warps: int = 4,
    capacity: int = 8192,
) -> torch.Tensor:
    """A token per row: what `filter_logits` and `sample_inverse_cdf` give, without a sort.

    The uniform number depends on (seed, position) alone, as in `reference.uniform`.

    Args:
        logits: [B, V], any float dtype, before temperature; V contiguous, at least one finite.
        temperature: [B] float32, above 0.
        top_k: [B] int, 0 for off. top_p: [B] float32, 1 for off. min_p: [B] float32, 0 for off.
        seeds, positions: [B] int64; a seed's 64 bits are taken as they are.
        best: [B] int64, a highest logit of each row if that is known.
        searched: False promises that no row has top-k or top-p, which spares launches.
        capacity: values per row that may be collected around the threshold; it is looked for more
            closely, and at last in the row itself, where there would be more.

    Returns:
        [B] int64.
    """
    rows, size = logits.shape
    device = logits.device
    best = greedy(logits) if best is None else best
    out = torch.empty(rows, dtype=torch.int64, device=device) if out is None else out
    block = min(block, max(64, triton.next_power_of_2(size)))
    num_parts = triton.cdiv(size, block)
    parts = max(2, triton.next_power_of_2(num_parts))
    # One tensor each: Triton compiles a kernel anew for every alignment.
    whole = torch.empty((rows, num_parts), dtype=torch.float32, device=device)
    above = torch.empty_like(whole)
    histograms = torch.empty((rows, num_parts, NUM_BINS), dtype=torch.int32, device=device)
    offsets = torch.empty((rows, num_parts), dtype=torch.int32, device=device)
    bounds = torch.empty((rows, 5), dtype=torch.int32, device=device)
    capacity = min(capacity, size)
    collected = torch.empty((rows, capacity), dtype=torch.int64, device=device)
    row_values = (logits, best, temperature, top_k, top_p, min_p)
    layout = (logits.stride(0), size, capacity)
    for refine in (False, True) if searched else (False,):
        histogram_kernel[(num_parts, rows)](
            *row_values, bounds, above if refine else whole, histograms, *layout,
            REFINE=refine, BLOCK=block, NUM_BINS=NUM_BINS, num_warps=warps,
        )  # fmt: skip
        if searched:
            bounds_kernel[(rows,)](
                top_k, top_p, min_p, whole, above, histograms, bounds, offsets, size, capacity,
                num_parts, REFINE=refine, PARTS=parts, NUM_BINS=NUM_BINS, num_warps=4,
            )  # fmt: skip
    if searched:
        collect_kernel[(num_parts, rows)](
            *row_values, bounds, offsets, above, collected, *layout, BLOCK=block, num_warps=warps
        )
    draw_kernel[(rows,)](
        *row_values, seeds, positions, whole, bounds, offsets, above, collected, out, *layout,
        num_parts, BLOCK=block, PARTS=parts, TILE=1024, PIVOTS=8, num_warps=8,
    )  # fmt: skip
    return out
