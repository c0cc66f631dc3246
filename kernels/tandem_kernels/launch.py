"""Launching kernels: whether those in Gluon can be, and how with half of the host's work.

`kernel[grid](...)` binds the arguments to names, asks each for its type and alignment, and prints
the options to find code that was compiled before. A launcher finds it by a short key.
"""

from typing import Any, Final

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tandem_kernels.compilation import is_collecting

KNOWS_GLUON: Final = hasattr(gl, "thread_barrier")
"""Whether the installed Triton has the Gluon that our kernels are written in.

Gluon is Triton's language for kernels that are scheduled by hand, and its names change with the
version. Ours is that of Triton 3.6, which the extra `gpu` installs. With any other version the
plain Triton kernels take over; they are slower.
"""

_MOST_KNOWN: Final = 4096


class Launcher:
    """Launches one kernel. Its constants are the last parameters of its signature."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled = isinstance(kernel, triton.runtime.JITFunction)  # not when interpreted
        self._known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, grid: tuple[int, int, int], *args: Any, **options: Any) -> None:
        """Launch the kernel, as `kernel[grid](*args, **options)` does.

        Args:
            args: tensors on the current device, descriptors of such tensors, and numbers.
            options: constants and launch options; each call site must keep to one order.
        """
        if not self._compiled or is_collecting():
            self._kernel[grid](*args, **options)
            return
        # More than Triton specialises by: every number, and each tensor's type and alignment.
        key = (
            torch.cuda.current_device(),
            *[_kind(arg) for arg in args],
            *options.values(),
        )
        found = self._known.get(key)
        if found is not None:
            code, constants = found
            code[grid](*args, *constants)
            return
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        code = self._kernel[grid](*args, **options)
        constants = tuple(options[name] for name in self._kernel.arg_names[len(args) :])
        self._known[key] = (code, constants)


def _kind(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, tuple(arg.block_shape)
    return arg
