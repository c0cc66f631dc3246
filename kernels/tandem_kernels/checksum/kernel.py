"""The checksum of bytes in one pass, each program's part by itself."""

import torch
import triton
import triton.language as tl

from tandem_kernels.checksum.reference import FIRST, SECOND, STEP, signed

_STEP = tl.constexpr(signed(STEP))
_FIRST = tl.constexpr(signed(FIRST))
_SECOND = tl.constexpr(signed(SECOND))
_MOST_PROGRAMS = 1024


@triton.jit
def shift_right(x, BITS: tl.constexpr):
    """With zeros coming in."""
    return (x.to(tl.uint64, bitcast=True) >> BITS).to(tl.int64, bitcast=True)


@triton.jit
def mixed(word, at, seed):
    """The term of the word at place `at`."""
    x = word ^ ((at + 1) * _STEP + seed)
    x = (x ^ shift_right(x, 30)) * _FIRST
    x = (x ^ shift_right(x, 27)) * _SECOND
    return x ^ shift_right(x, 31)


@triton.jit(do_not_specialize=["num_words", "num_rounds", "seed"])
def checksum_kernel(words, parts, num_words, num_rounds, seed, BLOCK: tl.constexpr):
    """Program p takes the blocks p, p + programs, and so on: `num_rounds` of them."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.int64)
    for turn in range(num_rounds):
        at = (turn * programs + program) * BLOCK + tl.arange(0, BLOCK)
        inside = at < num_words
        word = tl.load(words + at, mask=inside, other=0)
        total += tl.where(inside, mixed(word, at, seed), 0)
    tl.store(parts + program, tl.sum(total, axis=0))


def checksum_parts(words: torch.Tensor, seed: int, *, block: int = 1024) -> torch.Tensor:
    """What `reference.checksum_parts` computes, in parts of one program each."""
    assert words.dtype == torch.int64
    assert words.is_contiguous()
    num_words = words.numel()
    num_blocks = triton.cdiv(num_words, block)
    programs = max(1, min(num_blocks, _MOST_PROGRAMS))
    parts = torch.empty(programs, dtype=torch.int64, device=words.device)
    checksum_kernel[(programs,)](
        words,
        parts,
        num_words,
        triton.cdiv(num_blocks, programs),
        signed(seed),
        BLOCK=block,
        num_warps=8,
    )
    return parts
