"""Root mean square norm."""

from tandem_kernels.norm.reference import rms_norm

__all__ = ["rms_norm"]
