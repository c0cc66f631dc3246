"""Rotary position embedding."""

from tandem_kernels.rope.reference import apply_rope

__all__ = ["apply_rope"]
