"""Compiling many kernels at the same time.

Triton compiles a kernel when it is first launched, and the program waits. A large program first
runs once with `collect_kernels`, which launches none of the kernels that are not compiled yet, and
then has all of them compiled by threads: most of a compilation happens outside Python's lock.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UncompiledKernel:
    """A kernel for one kind of arguments, as Triton itself describes it (JSON)."""

    function: JITFunction[Any]
    specialization: str

    def load(self) -> None:
        """Compile it, or read it from Triton's cache, and load it to the current device."""
        kernel = self.function.preload(self.specialization)
        # Asking for what launches it has the launcher compiled, in C, and the binary loaded.
        _ = kernel.run


@contextmanager
def collect_kernels() -> Iterator[list[UncompiledKernel]]:
    """Note the kernels that would have to be compiled; they are not launched.

    So what they should have written keeps whatever was there. In this block all threads' launches
    are taken. Triton's interpreter compiles nothing: its kernels run.
    """
    found: dict[tuple[int, str], UncompiledKernel] = {}

    def note(**launch: Any) -> bool:
        function = launch["fn"].jit_function
        kernel = UncompiledKernel(function, launch["compile"]["specialization_data"])
        found.setdefault((id(function), launch["key"]), kernel)
        return True  # "don't compile": then there is nothing to launch

    kernels: list[UncompiledKernel] = []
    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        yield kernels
    finally:
        knobs.runtime.jit_cache_hook = before
        kernels += found.values()


@contextmanager
def compiling(kernels: Sequence[UncompiledKernel], num_threads: int) -> Iterator[None]:
    """Compile all of them for the current device, so many at a time, beside what the block does.

    At the end of the block they are there. Those that fail are logged, and left to their first
    launch, which raises what is wrong.
    """
    device = torch.cuda.current_device()
    with ThreadPoolExecutor(num_threads, "compile", torch.cuda.set_device, (device,)) as pool:
        running = [(kernel, pool.submit(kernel.load)) for kernel in kernels]
        yield
    for kernel, done in running:
        if (error := done.exception()) is not None:
            log.warning("%s was not compiled ahead: %r", kernel.function.__name__, error)
