"""The ratio of prefill to decode workers, applied to the numbers that their owners want.

Pure integers. `Fixed` is read as a rate: one pool follows the other, rounded up to whole multiples
so that nothing that was asked for is missing. `Bounded` holds a write back at the bound and leaves
the other pool alone, because a bound must not start workers that nobody asked for.
"""

from math import ceil

from tandem_operator.api.ratio import Ratio, RatioMode
from tandem_operator.pair import Pair

MAX_REPLICAS = 1024


def hold_ratio(ratio: Ratio, wanted: Pair[int], last: Pair[int]) -> Pair[int]:
    """The numbers to work towards, given what owners want and what was worked towards before.

    The pool whose number changed since `last` leads; when both or none did, decode leads in Fixed
    and prefill gives way in Bounded.
    """
    if ratio.mode is RatioMode.FIXED and ratio.fixed is not None:
        return _fixed(ratio.fixed.prefill, ratio.fixed.decode, wanted, last)
    if ratio.mode is RatioMode.BOUNDED:
        return _bounded(ratio, wanted, last)
    return wanted


def allows(ratio: Ratio, counts: Pair[int]) -> bool:
    """Whether `counts` keeps the ratio."""
    p, d = counts.prefill, counts.decode
    if ratio.mode is RatioMode.FIXED and ratio.fixed is not None:
        return p * ratio.fixed.decode == d * ratio.fixed.prefill
    if ratio.mode is RatioMode.BOUNDED:
        low, high = ratio.min, ratio.max
        return not (
            (low is not None and p * low.decode < d * low.prefill)
            or (high is not None and p * high.decode > d * high.prefill)
        )
    return True


def reachable(ratio: Ratio, low: Pair[int], high: Pair[int]) -> bool:
    """Whether any numbers within these bounds, at least one of each, keep the ratio."""
    first = max(low.prefill, 1)
    for decode in range(max(low.decode, 1), high.decode + 1):
        if ratio.mode is RatioMode.FIXED and ratio.fixed is not None:
            units, rest = divmod(decode, ratio.fixed.decode)
            if rest == 0 and first <= units * ratio.fixed.prefill <= high.prefill:
                return True
            continue
        least, most = _prefill_range(ratio, decode)
        if max(least, first) <= min(most, high.prefill):
            return True
    return False


def describe(ratio: Ratio) -> str:
    """The rule in words, for events and annotations."""
    if ratio.mode is RatioMode.FIXED and ratio.fixed is not None:
        return f"ratio.fixed {ratio.fixed.prefill}:{ratio.fixed.decode}"
    bounds = []
    if ratio.min is not None:
        bounds.append(f"min {ratio.min.prefill}:{ratio.min.decode}")
    if ratio.max is not None:
        bounds.append(f"max {ratio.max.prefill}:{ratio.max.decode}")
    return "ratio " + " and ".join(bounds)


def _fixed(p: int, d: int, wanted: Pair[int], last: Pair[int]) -> Pair[int]:
    prefill_changed = wanted.prefill != last.prefill
    decode_changed = wanted.decode != last.decode
    if prefill_changed and not decode_changed:
        units = ceil(wanted.prefill / p)
    elif decode_changed and not prefill_changed:
        units = ceil(wanted.decode / d)
    else:
        units = max(ceil(wanted.prefill / p), ceil(wanted.decode / d))
    units = min(units, MAX_REPLICAS // max(p, d))
    return Pair(units * p, units * d)


def _bounded(ratio: Ratio, wanted: Pair[int], last: Pair[int]) -> Pair[int]:
    if allows(ratio, wanted):
        return wanted
    decode_alone = wanted.decode != last.decode and wanted.prefill == last.prefill
    if decode_alone:
        held = Pair(wanted.prefill, _nearest(_decode_range(ratio, wanted.prefill), wanted.decode))
    else:
        held = Pair(_nearest(_prefill_range(ratio, wanted.decode), wanted.prefill), wanted.decode)
    return held if allows(ratio, held) else _search(ratio, wanted)


def _prefill_range(ratio: Ratio, decode: int) -> tuple[int, int]:
    low = ceil(decode * ratio.min.prefill / ratio.min.decode) if ratio.min is not None else 0
    high = decode * ratio.max.prefill // ratio.max.decode if ratio.max is not None else MAX_REPLICAS
    return low, high


def _decode_range(ratio: Ratio, prefill: int) -> tuple[int, int]:
    low = ceil(prefill * ratio.max.decode / ratio.max.prefill) if ratio.max is not None else 0
    high = (
        prefill * ratio.min.decode // ratio.min.prefill if ratio.min is not None else MAX_REPLICAS
    )
    return low, high


def _nearest(bounds: tuple[int, int], number: int) -> int:
    low, high = bounds
    return max(0, min(max(number, low), high, MAX_REPLICAS))


def _search(ratio: Ratio, wanted: Pair[int]) -> Pair[int]:
    # No whole number of prefill workers fits the wanted decode: the nearest decode that has one.
    # Never zero, which always fits: a ratio must not switch a service off.
    for distance in range(1, MAX_REPLICAS + 1):
        for decode in (wanted.decode + distance, wanted.decode - distance):
            if not 1 <= decode <= MAX_REPLICAS:
                continue
            prefill = _nearest(_prefill_range(ratio, decode), wanted.prefill)
            if allows(ratio, Pair(prefill, decode)):
                return Pair(prefill, decode)
    return Pair(0, 0)
