"""Where in a row the threshold of top-k and top-p can lie: counts by distance from the top.

A logit's distance from the row's highest one, in powers of 2 after the temperature, says what it
weighs: 2^-distance. Distances are counted in bins whose width is a sixteenth of their octave. The
rank and the mass of every bin's edge follow within tight bounds, and only the bins that may hold
the threshold are looked into afterwards: cut into bins themselves if they hold very much.
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
def as_bits(distance):
    """Integers in the order of the distances, which are not negative."""
    return distance.to(tl.int32, bitcast=True)


@triton.jit
def _near_edge(bins):
    """The bits of the least distance in each bin of the first level, 16 bins to an octave."""
    return tl.where(bins > 0, (bins + 1999) << 19, 0)


@triton.jit
def _power(exponent):
    """2^exponent, exactly; of int32 in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _narrow_bin(distance, low, shift):
    """The bin between bounds: equal steps of the bits, or of the distance itself next to 0."""
    steps = tl.minimum(distance * _power(shift), 127.0).to(tl.int32)  # the distance may be infinite
    return tl.where(low > 0, (as_bits(distance) - low) >> shift, steps)


@triton.jit
def _narrow_edge(bins, low, shift):
    """The bits of the least distance in such a bin [int64]."""
    near_zero = as_bits(bins.to(tl.float32) * _power(-shift)).to(tl.int64)
    return tl.where(low > 0, low.to(tl.int64) + (bins.to(tl.int64) << shift), near_zero)


@triton.jit
def _fit(low, high, NUM_BINS: tl.constexpr):
    """How far to shift, so that no more than NUM_BINS bins lie between bits [low, high]."""
    tl.static_assert(NUM_BINS == 128)
    width = tl.maximum(high - low, 0).to(tl.float32)
    octaves = (as_bits(width) >> 23) - 127
    near_zero = tl.maximum(6 - ((high >> 23) - 127), 0)  # the last bin takes all that is further
    return tl.where(low > 0, tl.maximum(octaves - 6, 0), near_zero)


@triton.jit
def histogram_kernel(
    logits,
    best,
    temperature,
    top_k,
    top_p,
    min_p,
    bounds,
    masses,
    histograms,
    stride,
    size,
    capacity,
    REFINE: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BINS: tl.constexpr,
):
    """Program (part, row): a part's mass, and its histogram if the row has to be searched.

    The mass is all of it, or what min-p keeps of it where nothing has to be searched. With REFINE
    only rows whose bounds hold too much are counted, between their bounds, and the mass is that of
    what is above them.
    """
    row = tl.program_id(1).to(tl.int64)
    part = row * tl.num_programs(0) + tl.program_id(0)
    searched = is_searched(tl.load(top_k + row), tl.load(top_p + row), size)
    wanted = True
    if REFINE:
        wanted = searched
        if searched:
            wanted = tl.load(bounds + row * 5 + 4) > capacity
    if wanted:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        raw = tl.load(logits + row * stride + at, mask=inside, other=float("-inf")).to(tl.float32)
        highest = tl.load(logits + row * stride + tl.load(best + row)).to(tl.float32)
        scale = 1.4426950408889634 / tl.load(temperature + row)
        distance = distance_from(highest, raw, scale)
        kept = inside
        if searched:
            bits = as_bits(distance)
            counted = inside
            if REFINE:
                low = tl.load(bounds + row * 5)
                kept = inside & (bits < low)
                counted = inside & (bits >= low) & (bits <= tl.load(bounds + row * 5 + 1))
                close = tl.where(counted, distance, 0.0)
                bins = _narrow_bin(close, low, tl.load(bounds + row * 5 + 2))
            else:
                bins = (bits >> 19) - 1999
            bins = tl.minimum(tl.maximum(bins, 0), NUM_BINS - 1)
            counts = tl.histogram(bins, NUM_BINS, mask=counted)
            tl.store(histograms + part * NUM_BINS + tl.arange(0, NUM_BINS), counts)
        else:
            kept = inside & (distance <= furthest(tl.load(min_p + row)))
        tl.store(masses + part, tl.sum(tl.where(kept, tl.exp2(-distance), 0.0), axis=0))


@triton.jit
def _sum_row(masses, row, num_parts, PARTS: tl.constexpr):
    parts = tl.arange(0, PARTS)
    mass = tl.load(masses + row * num_parts + parts, mask=parts < num_parts, other=0.0)
    return tl.sum(mass.to(tl.float64), axis=0)


@triton.jit
def _first_of(wanted, bins, NUM_BINS: tl.constexpr):
    """The first bin of which `wanted` is true, or the last one."""
    return tl.min(tl.where(wanted, bins, NUM_BINS - 1), axis=0)


@triton.jit
def _at(values, bins, index):
    return tl.sum(tl.where(bins == index, values, 0), axis=0)


@triton.jit
def bounds_kernel(
    top_k,
    top_p,
    min_p,
    masses,
    above,
    histograms,
    bounds,
    offsets,
    size,
    capacity,
    num_parts,
    REFINE: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
):
    """Program: one row. Between which distances its threshold lies, and where they are collected.

    bounds [5]: least and greatest bits of the distance, how far to shift them for `NUM_BINS` bins
    between, how many values top-k has left for them (0: it is off), and how many they hold.
    offsets [parts]: how many of those come before each part.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(top_k + row).to(tl.int32)
    p = tl.load(top_p + row)
    mine = bounds + row * 5
    wanted = is_searched(k, p, size)
    if REFINE and wanted:
        wanted = tl.load(mine + 4) > capacity
    if wanted:
        parts = tl.arange(0, PARTS)
        bins = tl.arange(0, NUM_BINS)
        whole = _sum_row(masses, row, num_parts, PARTS)
        if REFINE:
            k = tl.load(mine + 3)
            sure = _sum_row(above, row, num_parts, PARTS)
            low = tl.load(mine)
            end = tl.load(mine + 1).to(tl.int64) + 1
            shift = tl.load(mine + 2)
            near = tl.minimum(_narrow_edge(bins, low, shift), end).to(tl.int32)
            beyond = tl.minimum(_narrow_edge(bins + 1, low, shift), end)
            beyond = tl.where(bins + 1 < NUM_BINS, beyond, end).to(tl.int32)
        else:
            k = tl.where(k < size, k, 0)
            sure = whole * 0.0
            near = _near_edge(bins)
            beyond = tl.where(bins + 1 < NUM_BINS, _near_edge(bins + 1), 0x7F800001)
        here = histograms + (row * num_parts + parts[:, None]) * NUM_BINS + bins[None, :]
        found = tl.load(here, mask=(parts < num_parts)[:, None], other=0)
        counts = tl.sum(found, axis=0)
        ranks = tl.cumsum(counts, axis=0)
        # What lies up to the end of each bin weighs at least and at most: by the bins up to there,
        # or by those behind, whichever says more.
        heavy = tl.minimum(near, 0x7F800000).to(tl.float32, bitcast=True)
        heavy = tl.exp2(-heavy).to(tl.float64)
        # Infinity, the distance of -inf, is in the last bin; what comes after it is no number.
        light = tl.minimum(beyond, 0x7F800000).to(tl.float32, bitcast=True)
        light = tl.exp2(-light).to(tl.float64)
        most = counts.to(tl.float64) * heavy
        least = counts.to(tl.float64) * light
        upper = sure + tl.cumsum(most, axis=0)
        lower = sure + tl.cumsum(least, axis=0)
        if not REFINE:
            most_behind = tl.sum(most, axis=0) - upper
            least_behind = tl.sum(least, axis=0) - lower
            lower = tl.maximum(lower, whole - most_behind)
            upper = tl.minimum(upper, whole - least_behind)
        first = tl.min(bins, axis=0)
        last = tl.max(bins, axis=0)
        smallest = whole
        largest = whole
        if k > 0:
            last = _first_of(ranks >= k, bins, NUM_BINS)
            first = last
            # The mass that top-p's share is of.
            smallest = tl.where(last > 0, _at(lower, bins, last - 1), sure)
            largest = _at(upper, bins, last)
        if p < 1.0:
            slack = whole * 1.0e-5  # sums in another order round differently
            maybe = upper >= smallest * p - slack
            first = tl.minimum(_first_of(maybe, bins, NUM_BINS), last)
            if k <= 0:
                last = _first_of(lower >= largest * p + slack, bins, NUM_BINS)
        low_bits = _at(near, bins, first)
        high_bits = _at(beyond, bins, last) - 1
        # Where min-p cuts nearer than the others, only it counts and all is above.
        if as_bits(furthest(tl.load(min_p + row))) < low_bits:
            first = last + 1
            low_bits = 0x7FFFFFFF
        held = (bins >= first) & (bins <= last)
        each = tl.sum(tl.where(held[None, :], found, 0), axis=1)
        begin = tl.cumsum(each, axis=0) - each
        tl.store(offsets + row * num_parts + parts, begin, mask=parts < num_parts)
        before = tl.sum(tl.where(bins < first, counts, 0), axis=0)
        tl.store(mine, low_bits)
        tl.store(mine + 1, high_bits)
        tl.store(mine + 2, _fit(low_bits, high_bits, NUM_BINS))
        tl.store(mine + 3, tl.where(k > 0, k - before, 0))
        tl.store(mine + 4, tl.sum(each, axis=0))
    elif not REFINE:
        tl.store(mine + 4, 0)
