"""Compiling many kernels at the same time.

Triton compiles a kernel at its first launch, while the program waits. So a large program first runs
once under `collect_kernels`, which launches nothing, and then compiles the kernels it met in
threads: most of a compilation happens outside Python's lock.
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
        """Compile it for the current device and build its launcher, or find both in a cache.

        Threads may do this at the same time. The result must be passed to `load` before its launch.
        """
        kernel = self.function.preload(self.specialization)
        driver.active.launcher_cls(kernel.src, kernel.metadata)
        return kernel


def load(kernel: Any) -> None:
    """Load a compiled kernel and its launcher for the current device.

    Only one at a time: all launchers are extension modules of the same name, and when two threads'
    loads overlap, Python can give one thread the functions of the other's module.
    """
    _ = kernel.run


@contextmanager
def collect_kernels() -> Iterator[list[UncompiledKernel]]:
    """Launch no kernels, but collect those that would have to be compiled.

    Outputs therefore keep their old contents. The block affects the launches of all threads.
    Triton's interpreter compiles nothing, so its kernels do run.
    """
    # Compiled kernels must not run either: they may read what the others have not written.
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
    """Whether kernels are being collected instead of launched."""
    return _collecting


def compile_all(kernels: Sequence[UncompiledKernel], num_threads: int) -> None:
    """Compile all kernels for the current device, `num_threads` at a time.

    A kernel that fails is logged and left to its first launch, which raises the error.
    """
    device = torch.cuda.current_device()
    with ThreadPoolExecutor(num_threads, "compile", torch.cuda.set_device, (device,)) as pool:
        compiled = [(kernel, pool.submit(kernel.compile)) for kernel in kernels]
    for kernel, result in compiled:
        try:
            load(result.result())
        except Exception as error:  # whatever Triton, its compilers or the driver raise
            log.warning(
                "%s could not be compiled in advance: %r",
                kernel.function.__name__,
                error,
            )
