"""Pages written into another process's cache in one pass, with their checksum; or only summed.

The lower half of a gate's word counts the programs inside, the upper half is its generation. What
came before a change of generation is counted, what comes after it sees it: both are changes of one
word, so they have one order. docs/adr/0019 has the whole proof.
"""

import torch
import triton
import triton.language as tl

from tandem_kernels.checksum.kernel import shift_right
from tandem_kernels.checksum.reference import FIRST, SECOND, STEP, signed
from tandem_kernels.launch import Launcher
from tandem_kernels.page_push.reference import GENERATION, WORD_BYTES, PageTarget

_STEP = tl.constexpr(signed(STEP))
_FIRST = tl.constexpr(signed(FIRST))
_SECOND = tl.constexpr(signed(SECOND))
_GENERATION = tl.constexpr(GENERATION)
_PROGRAMS = 2112
"""16 of 128 threads for each of an H200's 132 multiprocessors: as many as run at a time."""


@triton.jit
def walk_pages(
    source, target, source_blocks, target_blocks, num_moved, num_pieces, run, pieces_of_run,
    source_side, target_side, seed, PUSH: tl.constexpr, CHECK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's pieces of all pages: written if PUSH; the sum of their words if CHECK."""
    places = tl.arange(0, BLOCK).to(tl.int64)
    lanes = (places + 1) * _STEP + seed
    total = tl.zeros([BLOCK], dtype=tl.int64)
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        page, part = piece // pieces_of_run, piece % pieces_of_run
        side, moved = (page // num_moved).to(tl.int64), page % num_moved
        start = part.to(tl.int64) * BLOCK
        inside = start + places < run
        at = side * source_side + tl.load(source_blocks + moved) * run + start
        word = tl.load(source + at + places, mask=inside, other=0)
        if PUSH:
            at = side * target_side + tl.load(target_blocks + moved) * run + start
            tl.store(tl.multiple_of(target + at + places, 16), word, mask=inside)
        if CHECK:
            x = word ^ (lanes + (page.to(tl.int64) * run + start) * _STEP)
            x = (x ^ shift_right(x, 30)) * _FIRST
            x = (x ^ shift_right(x, 27)) * _SECOND
            total += tl.where(inside, x ^ shift_right(x, 31), 0)
    return tl.sum(total, axis=0)


@triton.jit
def fence_aliases(ALIASED: tl.constexpr):
    """Order this thread's writes before what follows, for those who use other addresses too.

    To PTX, two addresses of one memory are two proxies; a release alone is for its own one.
    """
    if ALIASED:
        tl.inline_asm_elementwise(
            "fence.proxy.alias; mov.u32 $0, $1;",
            "=r,r",
            [tl.program_id(0)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["num_moved", "num_pieces", "gate", "generation"])
def push_pages_kernel(
    source, target, source_blocks, target_blocks, job, gate, generation,
    num_moved, num_pieces, run, pieces_of_run, source_side, target_side,
    CHECK: tl.constexpr, BLOCK: tl.constexpr, ALIASED: tl.constexpr,
):  # fmt: skip
    """Write the pages, unless the gate has another generation; job += [checksum, admitted, 0]."""
    door = gate.to(tl.pointer_type(tl.int64))
    seen = tl.atomic_add(door, 1, sem="acq_rel", scope="sys")
    if (seen >> 32) == generation:
        total = walk_pages(
            source, target.to(tl.pointer_type(tl.int64)), source_blocks, target_blocks,
            num_moved, num_pieces, run, pieces_of_run, source_side, target_side, tl.load(job + 2),
            PUSH=True, CHECK=CHECK, BLOCK=BLOCK,
        )  # fmt: skip
        tl.atomic_add(job, total)
        tl.atomic_add(job + 1, 1)
    fence_aliases(ALIASED)
    tl.debug_barrier()  # all threads have written; then one says so
    tl.atomic_add(door, -1, sem="acq_rel", scope="sys")


@triton.jit(do_not_specialize=["num_moved", "num_pieces"])
def sum_pages_kernel(
    source, blocks, job, num_moved, num_pieces, run, pieces_of_run, source_side,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """job += [checksum of the pages, 0, 0]."""
    total = walk_pages(
        source, source, blocks, blocks, num_moved, num_pieces, run, pieces_of_run,
        source_side, 0, tl.load(job + 2), PUSH=False, CHECK=True, BLOCK=BLOCK,
    )  # fmt: skip
    tl.atomic_add(job, total)


@triton.jit(do_not_specialize=["gate"])
def shut_gate_kernel(gate):
    """Begin the gate's next generation."""
    tl.atomic_add(gate.to(tl.pointer_type(tl.int64)), _GENERATION, sem="acq_rel", scope="sys")


_launch_push, _launch_sum = Launcher(push_pages_kernel), Launcher(sum_pages_kernel)


class _Walk:
    """How the programs of a launch share out the pages of some blocks: by pieces of a page."""

    def __init__(
        self, cache: torch.Tensor, blocks: torch.Tensor, layers: range, piece: int
    ) -> None:
        planes, num_blocks = cache.shape[1:3]
        assert cache.is_contiguous()
        assert blocks.dtype == torch.int64
        self.run = cache.stride(2) * cache.element_size() // WORD_BYTES
        self.side = num_blocks * self.run
        self.num_moved = blocks.shape[0]
        self.first_side = layers.start * planes
        self.words = cache.view(-1).view(torch.int64)[self.first_side * self.side :]
        self.piece = min(piece, triton.next_power_of_2(self.run))
        self.pieces_of_run = triton.cdiv(self.run, self.piece)
        self.num_pieces = planes * len(layers) * self.num_moved * self.pieces_of_run
        self.programs: int = max(1, min(self.num_pieces, _PROGRAMS))


def push_pages(
    cache: torch.Tensor,
    blocks: torch.Tensor,
    target: PageTarget,
    target_blocks: torch.Tensor,
    layers: range,
    job: torch.Tensor,
    *,
    check: bool,
    piece: int = 512,
) -> int:
    """What `page_push.push_pages` describes; the number of programs."""
    walk = _Walk(cache, blocks, layers, piece)
    target_side = target.num_blocks * walk.run
    _launch_push(
        (walk.programs, 1, 1),
        walk.words,
        target.address + walk.first_side * target_side * WORD_BYTES,
        blocks,
        target_blocks,
        job,
        target.gate,
        target.generation,
        walk.num_moved,
        walk.num_pieces,
        walk.run,
        walk.pieces_of_run,
        walk.side,
        target_side,
        CHECK=check,
        BLOCK=walk.piece,
        ALIASED=isinstance(push_pages_kernel, triton.runtime.JITFunction),  # not interpreted
        num_warps=4,
    )
    return walk.programs


def sum_pages(
    cache: torch.Tensor,
    blocks: torch.Tensor,
    layers: range,
    job: torch.Tensor,
    *,
    piece: int = 1024,
) -> None:
    """What `page_push.sum_pages` describes."""
    walk = _Walk(cache, blocks, layers, piece)
    _launch_sum(
        (walk.programs, 1, 1),
        walk.words,
        blocks,
        job,
        walk.num_moved,
        walk.num_pieces,
        walk.run,
        walk.pieces_of_run,
        walk.side,
        BLOCK=walk.piece,
        num_warps=4,
    )


def shut_gate(gate: int) -> None:
    """What `page_push.shut_gate` describes."""
    shut_gate_kernel[(1,)](gate)
