"""Compiling many kernels at the same time.

Triton compiles a kernel when it is first launched, and the program waits. A large program first
runs once with `collect_kernels`, which launches nothing, and then has the kernels that it came by
compiled by threads: most of a compilation happens outside Python's lock.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

log = logging.getLogger(__name__)
_collecting = False


@dataclass(frozen=True, slots=True)
class UncompiledKernel:
    """A kernel for one kind of arguments, as Triton itself describes it (JSON)."""

    function: JITFunction[Any]
    specialization: str

    def compile(self) -> Any:
        """Compile it for the current device and build what launches it, or find both in a cache.

        Threads may do this at the same time, but what they give must not be launched: see `load`.
        """
        kernel = self.function.preload(self.specialization)
        driver.active.launcher_cls(kernel.src, kernel.metadata)
        return kernel


def load(kernel: Any) -> None:
    """Load a compiled kernel, and what launches it, for the current device.

    One at a time: launchers are extension modules that all have one name, and Python gives a
    thread that loads one the functions of another's when the two loads overlap.
    """
    _ = kernel.run


@contextmanager
def collect_kernels() -> Iterator[list[UncompiledKernel]]:
    """Launch no kernels, but note those that would have to be compiled.

    So what they should have written keeps whatever was there. In this block all threads' launches
    are taken. Triton's interpreter compiles nothing: its kernels run.
    """
    # Compiled ones must not run either: they may read what the others have not written.
    global _collecting
    found: dict[tuple[int, str], UncompiledKernel] = {}

    def note(**launch: Any) -> bool:
        function = launch["fn"].jit_function
        kernel = UncompiledKernel(function, launch["compile"]["specialization_data"])
        found.setdefault((id(function), launch["key"]), kernel)
        return True  # "don't compile": then there is nothing to launch

    def look_up(function: Any, *args: Any, **options: Any) -> Any:
        return launch(function, *args, **{**options, "warmup": True})

    kernels: list[UncompiledKernel] = []
    launch, hook = JITFunction.run, knobs.runtime.jit_cache_hook
    JITFunction.run, knobs.runtime.jit_cache_hook = look_up, note
    _collecting = True
    try:
        yield kernels
    finally:
        _collecting = False
        JITFunction.run, knobs.runtime.jit_cache_hook = launch, hook
        kernels += found.values()


def is_collecting() -> bool:
    """Whether kernels are only noted at the moment."""
    return _collecting


def compile_all(kernels: Sequence[UncompiledKernel], num_threads: int) -> None:
    """Compile all of them for the current device, so many at a time.

    Those that fail are logged, and left to their first launch, which raises what is wrong.
    """
    device = torch.cuda.current_device()
    with ThreadPoolExecutor(num_threads, "compile", torch.cuda.set_device, (device,)) as pool:
        compiled = [(kernel, pool.submit(kernel.compile)) for kernel in kernels]
    for kernel, result in compiled:
        try:
            load(result.result())
        except Exception as error:  # whatever Triton, its compilers or the driver raise
            log.warning("%s was not compiled ahead: %r", kernel.function.__name__, error)
