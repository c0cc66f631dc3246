"""Linear layers."""

from tandem_kernels.linear.reference import linear

__all__ = ["linear"]
