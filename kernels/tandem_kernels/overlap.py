"""Programmatic dependent launch: a kernel starts while the one before it still runs.

A kernel launched with `launch_options(True)` may begin as soon as every program of its predecessor
has passed `wait_for_inputs`, or `let_next_start` where it calls that. Up to its own call of
`wait_for_inputs` it may only touch what no kernel in flight writes: weights and the step's plan.
That is when it asks the L2 for its first weights. Several kernels in a row can be in flight: a norm
that has let the next product start still waits for the product before.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait until the kernels before have ended, then let the next one start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """At the beginning of a short kernel: the next one may start before this one's inputs exist.

    The next one's own wait still covers all kernels before: each ends only after its predecessor.
    """
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def prefetch_lines(pointers):
    """Bring the 128-byte lines at these addresses into the L2; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@cache
def is_supported() -> bool:
    """Whether the current device can launch so: Hopper and later."""
    return torch.cuda.get_device_capability() >= (9, 0)


def starts_next_early(rows: int) -> bool:
    """Whether kernels of a step with so many rows call `let_next_start`.

    Not at one row: the many small programs of its products then crowd the multiprocessors that
    happen to be free first (an H200's step took 4.14 ms instead of 4.07).
    """
    return rows > 1


def launch_options(overlap: bool) -> dict[str, bool]:
    """Keyword arguments of a launch; the interpreter knows none of them."""
    return {"launch_pdl": True} if overlap else {}
