"""Programmatic dependent launch: a kernel starts while the one before it still runs.

A kernel launched with `launch_options(True)` may begin as soon as every program of its predecessor
has passed `wait_for_inputs`. Up to its own call of that function it may only touch what no kernel
in flight writes: weights and the step's plan. That is when it asks the L2 for its first weights.
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


def launch_options(overlap: bool) -> dict[str, bool]:
    """Keyword arguments of a launch; the interpreter knows none of them."""
    return {"launch_pdl": True} if overlap else {}
