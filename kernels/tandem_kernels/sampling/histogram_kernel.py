"""Where in a row the threshold of top-k and top-p can lie: counts by distance from the top.

A logit's distance from the row's highest one, in powers of 2 after the temperature, says what it
weighs: 2^-distance. Distances are counted in bins whose width is a sixteenth of their octave, the
rank and the mass of every bin's edge follow within tight bounds, and only the bins that may hold
the threshold are looked into afterwards.
"""

import triton
import triton.language as tl

NUM_BINS = 128
"""Bin 0 is below a quarter, the last one from 60 on."""


@triton.jit
def is_searched(top_k, top_p, size):
    """Whether a row's threshold depends on its other values: with top-k or top-p."""
    return ((top_k > 0) & (top_k < size)) | (top_p < 1.0)


@triton.jit
def distance_from(best, raw, scale):
    """Powers of 2 between the highest logit's probability and those of `raw`; 0 for ties."""
    # Where not even the highest is finite, all tie.
    return tl.where(raw == best, 0.0, (tl.maximum(best, -3.0e38) - raw) * scale)


@triton.jit
def furthest(share):
    """The distance up to which min-p keeps; infinite where it is off."""
    return tl.where(share > 0.0, -tl.log2(tl.where(share > 0.0, share, 1.0)), float("inf"))


@triton.jit
def find_bin(distance, NUM_BINS: tl.constexpr):
    """Of a float32 distance: its exponent and the first 4 bits of its mantissa."""
    bits = distance.to(tl.int32, bitcast=True) >> 19
    return tl.minimum(tl.maximum(bits - 1999, 0), NUM_BINS - 1)


@triton.jit
def _near_edge(bins):
    """The least distance in each of `bins`."""
    edge = ((bins + 1999) << 19).to(tl.float32, bitcast=True)
    return tl.where(bins > 0, edge, 0.0)


@triton.jit
def histogram_kernel(
    logits,
    best,
    temperature,
    top_k,
    top_p,
    min_p,
    masses,
    histograms,
    stride,
    size,
    BLOCK: tl.constexpr,
    NUM_BINS: tl.constexpr,
):
    """Program (part, row): the part's mass, and its histogram if the row has to be searched.

    Where nothing has to be searched, the mass is that of what min-p keeps.
    """
    row = tl.program_id(1).to(tl.int64)
    part = row * tl.num_programs(0) + tl.program_id(0)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    raw = tl.load(logits + row * stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    highest = tl.load(logits + row * stride + tl.load(best + row)).to(tl.float32)
    scale = 1.4426950408889634 / tl.load(temperature + row)
    distance = distance_from(highest, raw, scale)
    kept = inside
    if is_searched(tl.load(top_k + row), tl.load(top_p + row), size):
        counts = tl.histogram(find_bin(distance, NUM_BINS), NUM_BINS, mask=inside)
        tl.store(histograms + part * NUM_BINS + tl.arange(0, NUM_BINS), counts)
    else:
        kept = inside & (distance <= furthest(tl.load(min_p + row)))
    tl.store(masses + part, tl.sum(tl.where(kept, tl.exp2(-distance), 0.0), axis=0))


@triton.jit
def bounds_kernel(
    top_k,
    top_p,
    min_p,
    masses,
    histograms,
    bounds,
    offsets,
    size,
    num_parts,
    PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
):
    """Program: one row. Which bins may hold the threshold, and where its parts' values go.

    bounds [4]: first and last bin, values of top-k that are left for them (0: it is off), and how
    many values they hold. offsets [parts]: the values in those bins before each part.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    if is_searched(k, p, size):
        by_count = (k > 0) & (k < size)
        parts = tl.arange(0, PARTS)
        bins = tl.arange(0, NUM_BINS)
        here = histograms + (row * num_parts + parts[:, None]) * NUM_BINS + bins[None, :]
        found = tl.load(here, mask=(parts < num_parts)[:, None], other=0)
        mass = tl.load(masses + row * num_parts + parts, mask=parts < num_parts, other=0.0)
        whole = tl.sum(mass.to(tl.float64), axis=0)
        counts = tl.sum(found, axis=0)
        ranks = tl.cumsum(counts, axis=0)
        # What lies up to the end of each bin weighs at least and at most: by the bins up to there,
        # or by those behind, whichever says more.
        most = counts.to(tl.float64) * tl.exp2(-_near_edge(bins)).to(tl.float64)
        beyond = tl.where(bins + 1 < NUM_BINS, tl.exp2(-_near_edge(bins + 1)), 0.0)
        least = counts.to(tl.float64) * beyond.to(tl.float64)
        most_until = tl.cumsum(most, axis=0)
        least_until = tl.cumsum(least, axis=0)
        most_behind = tl.sum(most, axis=0) - most_until
        least_behind = tl.sum(least, axis=0) - least_until
        lower = tl.maximum(least_until, whole - most_behind)
        upper = tl.minimum(most_until, whole - least_behind)
        first = tl.sum((bins < 0).to(tl.int32), axis=0)
        last = first + NUM_BINS - 1
        smallest = whole
        largest = whole
        if by_count:
            last = tl.min(tl.where(ranks >= k, bins, NUM_BINS - 1), axis=0)
            first = last
            # The mass that top-p's share is of.
            smallest = tl.sum(tl.where(bins == last - 1, lower, 0.0), axis=0)
            largest = tl.sum(tl.where(bins == last, upper, 0.0), axis=0)
        if p < 1.0:
            slack = whole * 1.0e-5  # sums in another order round differently
            maybe = upper >= smallest * p - slack
            first = tl.minimum(tl.min(tl.where(maybe, bins, NUM_BINS - 1), axis=0), last)
            if not by_count:
                surely = lower >= largest * p + slack
                last = tl.min(tl.where(surely, bins, NUM_BINS - 1), axis=0)
        least_bin = find_bin(furthest(tl.load(min_p + row)), NUM_BINS)
        # Where min-p cuts nearer than the others, only it counts and all bins are above.
        first = tl.where(least_bin < first, NUM_BINS, first)
        held = (bins >= first) & (bins <= last)
        mine = tl.sum(tl.where(held[None, :], found, 0), axis=1)
        tl.store(
            offsets + row * num_parts + parts,
            tl.cumsum(mine, axis=0) - mine,
            mask=parts < num_parts,
        )
        above = tl.sum(tl.where(bins < first, counts, 0), axis=0)
        tl.store(bounds + row * 4, first)
        tl.store(bounds + row * 4 + 1, last)
        tl.store(bounds + row * 4 + 2, tl.where(by_count, k - above, 0).to(tl.int32))
        tl.store(bounds + row * 4 + 3, tl.sum(mine, axis=0))
    else:
        tl.store(bounds + row * 4 + 3, 0)
