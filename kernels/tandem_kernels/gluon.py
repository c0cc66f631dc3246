"""Gluon, Triton's language for kernels that are scheduled by hand."""

from typing import Final

from triton.experimental.gluon import language as gl

IS_KNOWN: Final = hasattr(gl, "thread_barrier")
"""Whether Triton's Gluon is the one that ours is written in: its names change with the version.

Ours is that of Triton 3.6, which the extra `gpu` installs. With another one the plain Triton
kernels take over; they are slower.
"""
