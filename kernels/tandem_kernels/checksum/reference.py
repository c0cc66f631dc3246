"""The checksum in plain Python, and in torch.

It is a sum modulo 2**64, over all 64-bit words, of a mix of the word, its number and the seed. One
changed word changes its own term, as the mix is a bijection of the word; words that change places,
or belong to another seed, change theirs. The mix is the finalizer of SplitMix64 (Steele, Lea and
Flood, 2014, after Stafford's variant 13). It finds errors, it doesn't keep out an attacker.
"""

import torch

MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15
FIRST = 0xBF58476D1CE4E5B9
SECOND = 0x94D049BB133111EB


def checksum(words: list[int], seed: int) -> int:
    """The checksum of 64-bit words."""
    total = 0
    for number, word in enumerate(words, start=1):
        x = (word & MASK) ^ ((seed + number * STEP) & MASK)
        x = ((x ^ (x >> 30)) * FIRST) & MASK
        x = ((x ^ (x >> 27)) * SECOND) & MASK
        total += x ^ (x >> 31)
    return total & MASK


def signed(value: int) -> int:
    """The 64-bit integer with the same bits."""
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def checksum_parts(words: torch.Tensor, seed: int) -> torch.Tensor:
    """`checksum` of words [n] int64 as its only part [1]."""
    number = torch.arange(1, words.numel() + 1, dtype=torch.int64, device=words.device)
    x = words ^ (number * signed(STEP) + signed(seed))
    x = (x ^ _shift(x, 30)) * signed(FIRST)
    x = (x ^ _shift(x, 27)) * signed(SECOND)
    return (x ^ _shift(x, 31)).sum().view(1)
